function __addp_complete
    set -l words (commandline -opc)
    set -g __addp_texts ($words[1] --complete $words[2..-1] (commandline -ct) 2> /dev/null)
    test (count $__addp_texts) -gt 0
end
complete -c addp -f -n __addp_complete -a '(printf "%s\n" $__addp_texts)'
