# Read by recipes/demo.sh: `step OUTPUT COMMAND...` runs a command unless it is complete.
#
# It is complete where the same words have made OUTPUT, and neither OUTPUT nor any file, cache or run that the words
# name has changed since. The table $STEPS, with tabs between stage, output, seconds, state and command, says so. A
# state is that of the output, + and that of the inputs; the output of an interrupted command has "-", and the call
# that completes it adds its seconds to those before. A cache or run that other words, or the same of other inputs, have
# made is kept under another name, since a command would refuse to go on with it.
# SHORTER=10 divides all numbers of training steps by 10: a look at every stage, not at its quality.
STEPS=${STEPS:-runs/demo/steps.tsv}
SHORTER=${SHORTER:-1}
STAGE=
mkdir -p "$(dirname "$STEPS")"
touch "$STEPS"
# The machine, for the report: processors, their name, system.
processor=$({ grep -m 1 'model name' /proc/cpuinfo || sysctl -n machdep.cpu.brand_string; } 2> /dev/null |
    sed 's/.*: //' || true)
echo "$(getconf _NPROCESSORS_ONLN) cores of ${processor:-an unknown processor}, $(uname -sm)" > "$(dirname "$STEPS")/machine.txt"

# A checksum of the paths among some words: of files, and of what a cache, a checkpoint or generated files have last.
state_of() {
    local path
    for path in "$@"; do
        case $path in
            *.py) ;;
            */*)
                if [ -f "$path" ]; then
                    cksum "$path"
                elif [ -d "$path" ]; then
                    find "$path" -maxdepth 2 \( -name COMPLETE.json -o -name manifest.json -o -name metadata.csv \) \
                        -exec cksum {} +
                    [ ! -f "$path/settings.json" ] || cksum "$path/settings.json"
                fi
                ;;
        esac
    done | LC_ALL=C sort | cksum | tr ' ' '-'
}

# Write the row of an output: seconds, state, command.
record() {
    local others
    others=$(awk -F '\t' -v output="$OUTPUT" '$2 != output' "$STEPS")
    {
        [ -z "$others" ] || printf '%s\n' "$others"
        printf '%s\t%s\t%s\t%s\t%s\n' "$STAGE" "$OUTPUT" "$@"
    } > "$STEPS.new"
    mv "$STEPS.new" "$STEPS"
}

# At the end of a recipe that was interrupted: the seconds of the command that ran.
OUTPUT=
trap '[ -z "$OUTPUT" ] || record $((BEFORE + $(date +%s) - BEGUN)) "-+$(state_of "${INPUTS[@]}")" "$WORDS"' EXIT

# Rename a folder to the first of NAME_former_1, NAME_former_2, ... that is not there.
keep_aside() {
    local number=1
    while [ -e "$1_former_$number" ]; do number=$((number + 1)); done
    echo "$1 was made by another command, or of other data: it is now $1_former_$number"
    mv "$1" "$1_former_$number"
}

step() {
    local output=$1 word previous='' words=() seconds='' state='' command='' inputs is_former=''
    shift
    INPUTS=()
    for word in "$@"; do
        case $previous in
            --max_steps | --logging_steps | --eval_steps | --save_steps | --*_start_step | --gan_*_steps)
                word=$(((word + SHORTER - 1) / SHORTER))
                ;;
        esac
        previous=$word
        words+=("$word")
        [ "$word" = "$output" ] || INPUTS+=("$word")
    done
    inputs=$(state_of "${INPUTS[@]}")
    WORDS=$(printf '%q ' "${words[@]}")
    WORDS=${WORDS% }
    IFS=$'\t' read -r seconds state command \
        < <(awk -F '\t' -v output="$output" '$2 == output' "$STEPS" | cut -f 3-) || true
    BEFORE=0
    if [ "$command" = "$WORDS" ]; then
        if [ -e "$output" ] && [ "$state" = "$(state_of "$output")+$inputs" ]; then
            echo "complete: $output"
            return
        fi
        case $state in
            "-+$inputs") BEFORE=$seconds ;;
            *"+$inputs") ;;
            *+*) is_former=1 ;; # A state without + is that of an earlier version: the command goes on.
        esac
    elif [ -n "$command" ]; then
        is_former=1
    fi
    # Generated files of another state; the scripts would leave them and write beside them.
    [ ! -f "$output/settings.json" ] || rm -r "$output"
    if [ -n "$is_former" ] && [ -d "$output" ]; then keep_aside "$output"; fi
    OUTPUT=$output BEGUN=$(date +%s)
    "${words[@]}"
    record $((BEFORE + $(date +%s) - BEGUN)) "$(state_of "$output")+$(state_of "${INPUTS[@]}")" "$WORDS"
    OUTPUT=
}
