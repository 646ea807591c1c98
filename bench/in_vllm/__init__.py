"""A whole vLLM with adapters, beside the same vLLM without any: ``python -m bench vllm``.

Each variant is an engine of its own, in a process of its own, on the same machine, one after another:

=========  ==============================================================
variant    what it is
=========  ==============================================================
``base``   no LoRA
``off``    LoRA on experts and attention, vLLM's own operators
``on``     the same with moe-lora as vLLM's plugin
``off-x``  LoRA on the experts alone, vLLM's own operators
``on-x``   the same with moe-lora
=========  ==============================================================

The model has the shape of Qwen3-30B-A3B and random weights; adapters are random, of one rank. Requests have
1,024 tokens in and 100 out, 80 at once, sampled greedily.
"""
