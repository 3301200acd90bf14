_addp() {
    local line="${COMP_LINE:0:COMP_POINT}" words current text
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current="${words[${#words[@]} - 1]}"
    COMPREPLY=()
    while IFS=$'\t' read -r text _; do
        # readline replaces what follows the equals sign
        [[ $current == *=* && $COMP_WORDBREAKS == *=* ]] && text="${text#*=}"
        COMPREPLY+=("$text")
    done < <("${words[0]}" --complete "${words[@]:1}" 2> /dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]]; then
        compopt -o nospace 2> /dev/null
    fi
}
complete -o default -F _addp addp
