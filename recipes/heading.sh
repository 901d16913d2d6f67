# Read by the recipes: `heading "Image VAE"` prints a line before a stage, with the time since the recipe began;
# `next COMMAND` at the end prints what to type next.
heading() { STAGE=$1 && printf '\n== %s  (after %d min %02d s)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
next() { printf 'next: %s\n' "$@"; }
