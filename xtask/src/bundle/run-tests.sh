#!/bin/sh
# Runs every test in this folder; arguments go to each of them, for example a name to filter by.
# Exits 1 if any failed. What was skipped, and why, is listed at the end.
here=$(cd "$(dirname "$0")" && pwd) || exit 1
export MOE_LORA_FIXTURES="$here/fixtures"
export MOE_LORA_CAPI="$here/capi"
export MOE_LORA_SKIP_LOG="${TMPDIR:-/tmp}/moe-lora-skipped.$$"
: > "$MOE_LORA_SKIP_LOG" || exit 1

failed=
for test in "$here"/tests/*; do
    echo "== ${test##*/}"
    "$test" "$@" || failed="$failed ${test##*/}"
done

echo "== skipped:"
cat "$MOE_LORA_SKIP_LOG"
rm -f "$MOE_LORA_SKIP_LOG"
if [ -n "$failed" ]; then
    echo "== failed:$failed"
    exit 1
fi
echo "== nothing failed"
