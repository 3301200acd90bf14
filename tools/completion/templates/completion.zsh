#compdef addp
_addp() {
    local -a open closed
    local text about
    while IFS=$'\t' read -r text about; do
        if [[ $text == *[=.] ]]; then open+=("$text"); else closed+=("$text"); fi
    done < <("$words[1]" --complete "${(@)words[2,CURRENT-1]}" "$PREFIX" 2> /dev/null)
    if (( $#open + $#closed )); then
        (( $#open )) && compadd -S '' -a open
        (( $#closed )) && compadd -a closed
    else
        compset -P '*='
        _files
    fi
}
compdef _addp addp
