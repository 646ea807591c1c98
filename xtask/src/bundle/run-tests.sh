#!/bin/sh
# Runs every test in this folder; arguments go to each of them, for example a name to filter by.
# Exits 1 if any failed. What was skipped, and why, is listed at the end.
here=$(cd "$(dirname "$0")" && pwd) || exit 1
export MOE_LORA_FIXTURES="$here/fixtures"
export MOE_LORA_CAPI="$here/capi"
export MOE_LORA_VLLM_OPS="$here/peers"
export MOE_LORA_SKIP_LOG="${TMPDIR:-/tmp}/moe-lora-skipped.$$"
: > "$MOE_LORA_SKIP_LOG" || exit 1

failed=
for test in "$here"/tests/*; do
    echo "== ${test##*/}"
    "$test" "$@" || failed="$failed ${test##*/}"
done

if [ -d "$here/python" ]; then
    echo "== python"
    python=${MOE_LORA_PYTHON:-python3}
    if "$python" -c 'import pytest' 2>/dev/null; then
        site=$(mktemp -d) || exit 1
        "$python" -m zipfile -e "$here"/python/*.whl "$site"
        (cd "$here/python/tests" && PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$site" \
            "$python" -m pytest -q -p no:cacheprovider ${1:+-k "$1"})
        # 5: no test has that name.
        case $? in 0 | 5) ;; *) failed="$failed python" ;; esac
        rm -r "$site"
    else
        echo "python: $python has no pytest" >> "$MOE_LORA_SKIP_LOG"
    fi
fi

echo "== skipped:"
cat "$MOE_LORA_SKIP_LOG"
rm -f "$MOE_LORA_SKIP_LOG"
if [ -n "$failed" ]; then
    echo "== failed:$failed"
    exit 1
fi
echo "== nothing failed"
