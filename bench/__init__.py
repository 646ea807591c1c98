"""moe-lora beside vLLM's fused MoE-LoRA operators, on one GPU, in one process.

``python -m bench --help`` lists what it does; ``cargo xtask bench`` prepares all that it needs.

==============  =====================================================================
fetch           vLLM's files, out of its wheels
probe           whether this machine can measure
cases           which calls are measured: models, sizes, sets of cases, JSON
floors          the fewest bytes and operations of a call
data            a case's tensors, and what the operator must compute
peers           vLLM's operators, out of vLLM's own wheels
vllm_defaults   what vLLM launches them with
ours            this project, through its Python package
measure         CUDA graphs, timed in turns; the machine's ceilings
precompile      Triton's compilations, in parallel and ahead of the measurements
implementation  what is asked of each of the two
operator_runs   calls, layers, routing: checked, then timed in turns
dense           dense layers, likewise
dense_peer      vLLM's pair of kernels for them
pairing         this project's stacked weights against its tables
run             the benchmark, part by part
records         its results, as JSON lines
first           the first result of a fresh process
schedule        the steps of a serving run
replay          those steps on the GPU
report          JSON lines to tables
chart           time over tokens, as a picture
==============  =====================================================================
"""
