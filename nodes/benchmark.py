from collections.abc import Callable
from dataclasses import replace
from functools import partial

import comfy.model_management as mm
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..rolling_kv.bench.step_caches.experiment import (
    Candidate,
    StepCacheExperiment,
    applicable,
    bytes_needed,
    check,
)
from ..rolling_kv.bench.step_caches.report import change_note, constants_notes, describe, plot, table
from ..rolling_kv.bench.step_caches.run import compare, decode_video, measure, step_change
from ..rolling_kv.bench.step_caches.similarity import Similarity
from ..rolling_kv.config import SamplingConfig
from ..rolling_kv.devices import check_memory
from ..rolling_kv.step_cache import METHODS, StepCacheMethod
from . import borders, inputs, run
from .guard import guarded
from .types import CATEGORY, VAE, Model


class RollingKVBenchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVBenchmark",
            display_name="Benchmark Step Caches",
            category=CATEGORY,
            description=(
                "Measures on your own model what each step cache brings: seconds, speed-up, work left out and memory, and "
                "how much the video still resembles the one made without. For models that sample in many steps. It makes "
                "the same short video over and over, so it takes a while; cancel at any time."
            ),
            search_aliases=["benchmark", "step cache", "teacache", "compare", "speed", "psnr", "ssim", "measure"],
            inputs=[
                Model.Input("model", tooltip="From Load Causal Video Model, Attach Rolling Cache or Step Cache."),
                io.Conditioning.Input(
                    "positive", tooltip="What the video shows. From Encode Prompt or CLIP Text Encode."
                ),
                io.DynamicCombo.Input(
                    "methods",
                    options=[
                        io.DynamicCombo.Option("all", []),
                        io.DynamicCombo.Option("chosen", [_switch(method) for method in METHODS.values()]),
                    ],
                    tooltip="Which step caches to measure. All: every one that can run here. The settings of a Step Cache "
                    "node before this one are measured as well.",
                ),
                _steps(),
                io.Int.Input(
                    "chunks",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="Length of each video (3 latent frames per chunk, or 1 for frame-wise models).",
                ),
                io.Int.Input(
                    "first_seed", default=0, min=0, max=0xFFFFFFFF, tooltip="Of the noise of the first video."
                ),
                inputs.side("width", ""),
                inputs.side("height", ""),
                VAE.Input(
                    "vae",
                    optional=True,
                    tooltip="From Load Streaming VAE: decodes the videos to compare them. Without it there is no quality.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to avoid. Only read when there is guidance."
                ),
                inputs.guidance(advanced=False),
                io.Combo.Input(
                    "strengths",
                    options=["all", "defaults"],
                    optional=True,
                    advanced=True,
                    tooltip="All: each step cache from gentle to strong, for curves. Defaults: each with its default "
                    "settings only, in a third of the time.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["multi-step", "bidirectional"],
                    optional=True,
                    advanced=True,
                    tooltip="Multi-step: chunk by chunk with the rolling cache. Bidirectional: all frames at once and "
                    "without it, as ordinary Wan models sample.",
                ),
                io.Int.Input(
                    "videos",
                    default=1,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="Seeds to average over, from the first one on.",
                ),
                io.Boolean.Input(
                    "memory",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Also measure peak memory. On a CUDA GPU that costs nothing, elsewhere one more run, a slow "
                    "one, per setting.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="table", tooltip="All figures as a Markdown table, for Preview as Text or a file."
                ),
                io.Image.Output(
                    display_name="plot", tooltip="Quality over speed-up, one curve per step cache, for Save Image."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            accept_all_inputs=True,
        )

    @classmethod
    def validate_inputs(cls, model, methods=None, steps=None, guidance=None) -> bool | str:
        # ComfyUI gives all dynamic combos of a node here; one whose value is none of its choices as the bare value.
        return True if isinstance(methods, dict) else "methods must be all or chosen"

    @classmethod
    @guarded
    def execute(
        cls, model, positive, methods, steps, chunks, first_seed, width, height, vae=None, negative=None, guidance=None,
        strengths="all", mode="multi-step", videos=1, memory=True,
    ) -> io.NodeOutput:  # fmt: skip
        names, notes = applicable(_chosen(methods))
        model.execution.check(step_cache=True)
        if vae is not None:
            borders.check_vae(vae.model.geometry, model.geometry)
        experiment = StepCacheExperiment(
            model.engine, borders.embedding(positive, "positive"),
            None if negative is None else borders.embedding(negative, "negative"), mode,
            _with_steps(inputs.with_guidance(model.sampling, guidance), steps), model.cache, height, width, chunks,
            tuple(range(first_seed, first_seed + videos)), memory, model.execution,
        )  # fmt: skip
        own = (
            [] if model.step_cache is None else [Candidate("Step Cache node", model.step_cache.title, model.step_cache)]
        )
        check(experiment, own)
        say = partial(run.say, node_id=cls.hidden.unique_id)
        with run.progress(cls.hidden.unique_id) as on_pass:
            model.patcher.workspace.clear()  # of an earlier Sample Video: in the way here, and only a matter of time there
            needed = bytes_needed(experiment, names, own)
            if model.patcher.load_device.type == "cpu":
                check_memory(needed, "this benchmark", "make the picture or the window smaller, or choose fewer chunks")
            run.bring_to_device(model, needed)
            if experiment.sampling.few_step:
                raise ValueError(_why_not(replace(experiment, chunks=1), on_pass))
            results, constants = measure(
                experiment, names, defaults_only=strengths == "defaults", more=own, on_pass=on_pass,
                on_run=lambda done, total, what: say(f"{done + 1} of {total}: {what}"),
            )  # fmt: skip
            notes += _compare(results, vae, height, width, say)
        mm.soft_empty_cache()
        say(f"{len(results) - 1} settings measured")
        notes = constants_notes(constants) + notes
        text = "\n\n".join([describe(experiment).replace("\n", "  \n"), table(results), *notes])
        picture = _to_image(plot(experiment, results))
        return io.NodeOutput(text, picture, ui=ui.PreviewImage(picture).as_dict() | {"text": (text,)})


def _steps() -> io.DynamicCombo.Input:
    count = io.Int.Input("count", default=50, min=1, max=1000, tooltip="Denoising steps per chunk.")
    return inputs.choice(
        "steps",
        {inputs.OWN: [], inputs.SO_MANY: [count]},
        "Denoising steps per chunk. The model's own must be many: a few-step model is refused, with the reason measured.",
    )


def _switch(method: type[StepCacheMethod]) -> io.Boolean.Input:
    return io.Boolean.Input(
        method.name, display_name=method.title, default=True, tooltip=f"Whether to measure {method.title}."
    )


def _chosen(methods: dict) -> list[str] | None:
    """Names of the methods, None for all. methods: what the combo gives, its choice under "methods"."""
    if methods["methods"] == "all":
        return None
    names = [name for name in METHODS if methods.get(name)]
    if not names:
        raise ValueError('No step cache is chosen. Switch on at least one, or set methods to "all".')
    return names


def _with_steps(sampling: SamplingConfig, chosen: dict) -> SamplingConfig:
    """The sampling settings with what `_steps` gives; more steps than a distilled model has are a solver's."""
    if chosen["steps"] == inputs.OWN:
        return sampling
    sampler = "unipc" if sampling.few_step else sampling.sampler
    return replace(sampling, sampler=sampler, num_inference_steps=chosen["count"])


def _compare(results: list, vae, height: int, width: int, say: Callable[[str], None]) -> list[str]:
    """Compare the videos with those made without a step cache; returns what is to be said of the figures."""
    if vae is None:
        return ["No quality: connect a VAE to compare the videos."]
    say("Comparing the videos")
    vae.bring_to_device(vae.model.decode_bytes(height, width))
    similarity = Similarity()
    compare(results, lambda latents: decode_video(vae.model, latents, run.check_cancelled), similarity)
    return similarity.notes


def _why_not(experiment: StepCacheExperiment, on_pass) -> str:
    return (
        "This model makes a chunk in few steps, and there is nothing to leave out. "
        f"{change_note(experiment, step_change(experiment, on_pass))} "
        "Step caches are for sampling in many steps: set steps to 20 or more here, or choose the preset "
        "causal-multistep in Load Causal Video Model, if the model can do that; distilled models cannot do it well."
    )


def _to_image(picture: Image.Image) -> torch.Tensor:
    """[1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None]
