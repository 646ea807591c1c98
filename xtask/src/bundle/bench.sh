#!/bin/sh
# Measures moe-lora beside vLLM's operators on this machine's GPU, under eight minutes; arguments go to
# `python -m bench run`, for example --quick (90 seconds) or --cases FILE.json. Needs a Python with torch and
# triton: python3, or the one that MOE_LORA_PYTHON names. Leaves results.jsonl and report/ in this folder.
# Exits 1 if any result failed.
here=$(cd "$(dirname "$0")" && pwd) || exit 1
python=${MOE_LORA_PYTHON:-python3}
export PYTHONPATH="$here/site:$here"

"$python" -m bench.probe || exit 1
if [ ! -d "$here/site" ]; then
    "$python" -m zipfile -e "$here"/python/*.whl "$here/site" || exit 1
fi
# Nothing is fetched where `cargo xtask bundle --peers` brought the files along.
"$python" -m bench.fetch "$here/peers" || exit 1
"$python" -m bench run --peers "$here/peers" --out "$here/results.jsonl" "$@"
status=$?
"$python" -m bench report "$here/results.jsonl" --out "$here/report" || exit 1
exit $status
