"""One variant's engine: ``python -m bench.in_vllm.engine FOLDER VARIANT``.

Reads ``settings.json``, ``model`` and ``adapters`` of the folder, and writes ``VARIANT.json`` there.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from .settings import VARIANTS, Settings

#: A step so many times as long as the median one had prompts in it.
PROMPT_STEP = 2.5
#: Steps that are profiled, of each kind.
PROFILED = 3


class Engine:
    """vLLM, and the requests that it is given in each round."""

    def __init__(self, folder: Path, variant: str) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.settings = settings = Settings.read(folder / "settings.json")
        self.folder, self.variant = folder, variant
        has_lora, on_experts, _ = VARIANTS[variant]
        arguments: dict[str, Any] = {
            "model": str(folder / "model"),
            "load_format": "dummy",
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "max_model_len": settings.tokens_in + settings.tokens_out + 64,
            "max_num_seqs": settings.at_once,
            "max_num_batched_tokens": settings.step_tokens,
            "enable_prefix_caching": False,
            "enforce_eager": settings.eager,
            "disable_log_stats": False,
        }
        if not settings.eager:
            sizes = sorted({1, 16, 48, 64, settings.at_once})
            arguments["compilation_config"] = {"cudagraph_capture_sizes": sizes}
        self.adapters = []
        if has_lora:
            rank = settings.max_rank or settings.rank
            arguments |= {
                "enable_lora": True,
                "max_loras": settings.adapters,
                "max_cpu_loras": settings.adapters,
                "max_lora_rank": rank,
            }
            if on_experts:
                arguments["lora_target_modules"] = ["experts"]
            self.adapters = [
                LoRARequest(f"a{number}", number + 1, str(folder / f"adapters/a{number}"))
                for number in range(settings.adapters)
            ]
        if settings.profile:
            arguments["profiler_config"] = {"profiler": "torch", "torch_profiler_dir": str(folder / variant)}
        begun = time.monotonic()
        self.llm = LLM(**(arguments | settings.engine))
        self.start_s = time.monotonic() - begun
        draw = random.Random(1)
        self.prompts = [
            {"prompt_token_ids": [draw.randrange(10, 150_000) for _ in range(settings.tokens_in)]}
            for _ in range(settings.requests)
        ]

    def generate(self, tokens: int, logprobs: int | None = None, requests: int | None = None) -> list[Any]:
        """Answers all requests, or the first few."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        prompts = self.prompts[:requests]
        who = [self.adapters[i % len(self.adapters)] for i in range(len(prompts))] if self.adapters else None
        outputs: list[Any] = self.llm.generate(prompts, params, lora_request=who, use_tqdm=False)
        return outputs

    def round(self) -> tuple[dict[str, Any], list[Any]]:
        """Answers all requests once, timed, and returns the outputs too."""
        engine = self.llm.llm_engine
        step, ends = engine.step, []

        def timed() -> Any:
            done = step()
            ends.append(time.perf_counter())
            return done

        engine.step = timed
        begun = time.perf_counter()
        outputs = self.generate(self.settings.tokens_out)
        seconds = time.perf_counter() - begun
        engine.step = step
        gaps = [1e3 * (end - start) for start, end in zip(ends, ends[1:], strict=False)]
        usual = median(gaps)
        prompts = [gap for gap in gaps if gap > PROMPT_STEP * usual]
        first = [o.metrics.first_token_latency for o in outputs if o.metrics is not None]
        return {
            "seconds": seconds,
            "requests_per_s": len(outputs) / seconds,
            "decode_ms": usual,
            "prompt_ms": median(prompts) if prompts else None,
            "prompt_steps": len(prompts),
            "first_token_ms": 1e3 * median(first) if first else None,
        }, outputs

    def profile(self) -> dict[str, Any]:
        """Kernels of steps with prompts, and of decode steps: milliseconds a step, by name."""
        engine, step = self.llm.llm_engine, self.llm.llm_engine.step
        at_once = self.settings.at_once
        prompt_steps = -(-at_once * self.settings.tokens_in // self.settings.step_tokens)
        found = {}
        for kind, first in (("prompt", 2), ("decode", prompt_steps + 8)):
            count = 0

            def counted(first: int = first, kind: str = kind) -> Any:
                nonlocal count
                if count == first:
                    self.llm.start_profile(f"{self.variant}-{kind}")
                done = step()
                count += 1
                if count == first + PROFILED:
                    self.llm.stop_profile()
                return done

            engine.step = counted
            self.generate(40, requests=at_once)
            engine.step = step
            traces = sorted((self.folder / self.variant).glob(f"*{kind}*.json*"))
            found[kind] = kernels(traces[-1]) if traces else {}
        return found


def kernels(trace: Path) -> dict[str, list[float]]:
    """Milliseconds and launches a step of each kernel of a profile, the longest first."""
    opened = gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open()
    with opened as file:
        events = json.load(file)["traceEvents"]
    time_of: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "kernel":
            time_of[event["name"]] += event["dur"]
            launches[event["name"]] += 1
    return {
        name[:120]: [micros / 1e3 / PROFILED, launches[name] / PROFILED]
        for name, micros in time_of.most_common(40)
    }


def best_two(output: Any) -> list[list[float]]:
    """The two best first tokens of an output, and their log probabilities."""
    by_token = output.outputs[0].logprobs[0]
    ranked = sorted(by_token.items(), key=lambda item: -item[1].logprob)[:2]
    return [[token, value.logprob] for token, value in ranked]


def main(folder: Path, variant: str) -> None:
    engine = Engine(folder, variant)
    # The first round reads the adapters and compiles what is left.
    begun = time.monotonic()
    engine.generate(2, requests=len(engine.adapters) or 1)
    record: dict[str, Any] = {"start_s": engine.start_s, "first_s": time.monotonic() - begun, "rounds": []}
    engine.round()
    for _ in range(engine.settings.rounds):
        timed, outputs = engine.round()
        print(f"{variant}: {json.dumps(timed)}", flush=True)
        record["rounds"].append(timed)
    record["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
    record["first_two"] = [best_two(output) for output in engine.generate(1, logprobs=2)]
    (folder / f"{variant}.json").write_text(json.dumps(record))
    if engine.settings.profile:
        record["profile"] = engine.profile()
        (folder / f"{variant}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    # vLLM's processes may take half a minute to end; who started this one ends them.
    sys.stdout.flush()
    os._exit(0)
