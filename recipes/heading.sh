# Read by the recipes: `heading "Image VAE"` prints a line before a stage, with the time since the recipe began;
# `next COMMAND` at the end prints what to type next. `to_repository NAME...` changes into the repository, where
# variables still name the files and folders of the caller's folder; a plain name that is neither there nor here is refused.
# `once FOLDER COMMAND...` evaluates, unless FOLDER/metrics.json is newer than every checkpoint of the runs that the
# command names; remove that file to measure with other flags.
heading() { STAGE=$1 && printf '\n== %s  (after %d min %02d s)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
next() { printf 'next: %s\n' "$@"; }
to_repository() {
    local caller=$PWD name value
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    [ ! "$caller" -ef . ] || caller=$PWD
    for name in "$@"; do
        value=${!name}
        case $value in
            '' | /*) continue ;;
        esac
        if [ "$caller" != "$PWD" ] && [ -e "$caller/$value" ]; then
            printf -v "$name" '%s' "$caller/$value"
            continue
        fi
        case $value in
            */* | *.* | python-topics) ;; # Paths, hub names and what Python knows: it looks for them.
            *)
                if [ ! -e "$value" ]; then
                    echo "$name=$value: there is no $caller/$value, and a data set of the hub is named user/name" >&2
                    exit 2
                fi
                ;;
        esac
    done
}
once() {
    local folder=$1 word newer=
    shift
    if [ -f "$folder/metrics.json" ]; then
        for word in "$@"; do
            [ ! -d "$word" ] ||
                newer+=$(find "$word" -maxdepth 2 -name COMPLETE.json -newer "$folder/metrics.json")
        done
        if [ -z "$newer" ]; then
            echo "evaluated: $folder/metrics.json"
            return
        fi
    fi
    "$@"
}
