# Read by recipes/demo.sh: `step OUTPUT COMMAND...` runs a command unless it is complete. `beside OUTPUT COMMAND...` does
# so while the recipe goes on, for what one core does and nothing later reads; the next `beside`, or `meet`, waits for
# its end.
#
# It is complete where the same words have made OUTPUT, and neither OUTPUT nor any file, cache or run that the words
# name has changed since. The table $STEPS, with tabs between stage, output, seconds, state and command, says so. It only
# grows, so that recipes may run at the same time; the last row of an output counts. Seconds are those that the recipe
# took longer for the command. A state is that of the output, + and that of the inputs; the output of an interrupted
# command has "-", and the call that completes it adds its seconds to those before. A cache or run that other words, or
# the same of other inputs, have made is kept under another name, since a command would refuse to go on with it.
# SHORTER=10 divides the numbers of training steps by 10, and those of evaluated samples down to FEWEST;
# training evaluates at its end alone. A look at every stage, not at its quality.
STEPS=${STEPS:-runs/demo/steps.tsv}
SHORTER=${SHORTER:-1}
FEWEST=96
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

# Add the row of an output: stage, output, seconds, state, command. A line of this length is written at once.
record() { printf '%s\t%s\t%s\t%s\t%s\n' "$@" >> "$STEPS"; }

# At the end of a recipe that was interrupted: the seconds of the command that ran; the one beside it ends, too.
OUTPUT='' BESIDE=''
leave() {
    if [ -n "$BESIDE" ]; then
        kill -TERM -- "-$BESIDE" 2> /dev/null || true
        rm -f "$BESIDE_LOG"
    fi
    [ -z "$OUTPUT" ] ||
        record "$STAGE" "$OUTPUT" $((BEFORE + $(date +%s) - BEGUN)) "-+$(state_of "${INPUTS[@]}")" "$WORDS"
}
trap leave EXIT

# Rename a folder to the first of NAME_former_1, NAME_former_2, ... that is not there.
keep_aside() {
    local number=1
    while [ -e "$1_former_$number" ]; do number=$((number + 1)); done
    mv "$1" "$1_former_$number"
    echo "$1 is made anew, since $2; the former one is now $1_former_$number"
}

# Those words, of some, that are paths of files or folders.
paths_of() {
    local path paths=()
    for path in "$@"; do
        case $path in *.py) ;; */*) [ ! -e "$path" ] || paths+=("$path") ;; esac
    done
    echo "${paths[*]-}"
}

# Decide about a step. Sets COMMAND (empty: it is complete), WORDS, INPUTS and BEFORE, the seconds that it has had.
plan() {
    local output=$1 word previous='' seconds='' state='' command='' inputs reason=''
    shift
    INPUTS=() COMMAND=()
    for word in "$@"; do
        case $previous in
            --max_steps | --logging_steps | --*_start_step | --gan_*_steps)
                word=$(((word + SHORTER - 1) / SHORTER))
                ;;
            --max_samples | --training_samples | --reader_steps)
                [ "$word" -le "$FEWEST" ] || word=$((word / SHORTER > FEWEST ? word / SHORTER : FEWEST))
                ;;
        esac
        previous=$word
        COMMAND+=("$word")
        [ "$word" = "$output" ] || INPUTS+=("$word")
    done
    inputs=$(state_of "${INPUTS[@]}")
    WORDS=$(printf '%q ' "${COMMAND[@]}")
    WORDS=${WORDS% }
    IFS=$'\t' read -r seconds state command \
        < <(awk -F '\t' -v output="$output" '$2 == output { row = $0 } END { print row }' "$STEPS" | cut -f 3-) || true
    BEFORE=0
    if [ "$command" = "$WORDS" ]; then
        if [ -e "$output" ] && [ "$state" = "$(state_of "$output")+$inputs" ]; then
            echo "complete: $output"
            COMMAND=()
            return
        fi
        case $state in
            "-+$inputs") BEFORE=$seconds ;;
            *"+$inputs") ;;
            # A state without + is that of an earlier version: the command goes on.
            *+*) reason="what it was made of has changed: $(paths_of "${INPUTS[@]}")" ;;
        esac
    elif [ -n "$command" ]; then
        reason="another command made it"
    fi
    # Generated files of another state; the scripts would leave them and write beside them.
    [ ! -f "$output/settings.json" ] || rm -r "$output"
    [ -n "$reason" ] && [ -e "$output" ] || return 0
    if [ -d "$output" ]; then keep_aside "$output" "$reason"; else echo "$output is made anew, since $reason"; fi
}

step() {
    # What ran beside the last command may have come to its end.
    is_beside || meet
    plan "$@"
    [ -n "${COMMAND[*]-}" ] || return 0
    OUTPUT=$1 BEGUN=$(date +%s)
    # A process that is alone has all cores.
    if [ "${COMMAND[0]}" = torchrun ] || is_beside; then
        "${COMMAND[@]}"
    else
        OMP_NUM_THREADS=${ALONE:-1} "${COMMAND[@]}"
    fi
    record "$STAGE" "$OUTPUT" $((BEFORE + $(date +%s) - BEGUN)) \
        "$(state_of "$OUTPUT")+$(state_of "${INPUTS[@]}")" "$WORDS"
    OUTPUT=
}

beside() {
    meet
    plan "$@"
    [ -n "${COMMAND[*]-}" ] || return 0
    BESIDE_STAGE=$STAGE BESIDE_OUTPUT=$1 BESIDE_WORDS=$WORDS BESIDE_INPUTS=("${INPUTS[@]}")
    BESIDE_LOG=$(mktemp "${TMPDIR:-/tmp}/beside.XXXXXX")
    # In a process group of its own, so that all of it can be ended.
    set -m
    "${COMMAND[@]}" > "$BESIDE_LOG" 2>&1 < /dev/null &
    set +m
    BESIDE=$!
    echo "beside the next commands: $BESIDE_WORDS"
}

# Whether something runs beside.
is_beside() { [ -n "$BESIDE" ] && kill -0 "$BESIDE" 2> /dev/null; }

# Wait for what runs beside, and show what it has written.
meet() {
    local begun failed=''
    [ -n "$BESIDE" ] || return 0
    begun=$(date +%s)
    wait "$BESIDE" || failed=$?
    BESIDE=
    cat "$BESIDE_LOG"
    rm "$BESIDE_LOG"
    if [ -n "$failed" ]; then
        echo "failed with status $failed: $BESIDE_WORDS" >&2
        exit "$failed"
    fi
    record "$BESIDE_STAGE" "$BESIDE_OUTPUT" $(($(date +%s) - begun)) \
        "$(state_of "$BESIDE_OUTPUT")+$(state_of "${BESIDE_INPUTS[@]}")" "$BESIDE_WORDS"
}
