from comfy_api.latest import io

from ..rolling_kv.step_cache import METHODS
from .types import CATEGORY, Model

BY_TITLE = {method.title: method for method in METHODS.values()}


class RollingKVStepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVStepCache",
            display_name="Step Cache",
            category=CATEGORY,
            description=(
                "Makes multi-step sampling faster by leaving out work that hardly changes from one denoising step to "
                "the next. For models that sample in many steps; few-step (distilled) ones have nothing to leave out, "
                "and Sample Video then says so, with the figure, and makes the video without it."
            ),
            search_aliases=[
                "teacache",
                "pab",
                "pyramid attention broadcast",
                "fastercache",
                "first block cache",
                "fbcache",
                "taylorseer",
                "magcache",
                "seacache",
                "speed up",
            ],
            inputs=[
                Model.Input("model", tooltip="From Load Causal Video Model or Attach Rolling Cache."),
                io.DynamicCombo.Input(
                    "method",
                    options=_options(),
                    tooltip="How to tell what can be left out. The help page says what each method does and costs.",
                ),
            ],
            outputs=[Model.Output(display_name="model", tooltip="The model with this step cache, for Sample Video.")],
        )

    @classmethod
    def execute(cls, model, method) -> io.NodeOutput:
        return io.NodeOutput(model._replace(step_cache=to_method(method)))


def to_method(chosen: dict):
    """The engine's method for what the combo gives: its title under "method", and its settings."""
    settings = {name: value for name, value in chosen.items() if name != "method"}
    for name in [name.removesuffix("_low") for name in settings if name.endswith("_low")]:
        settings[name] = settings.pop(f"{name}_low"), settings.pop(f"{name}_high")
    if "mag_ratios" in settings:
        settings["mag_ratios"] = _numbers(settings["mag_ratios"])
    if settings.get("disable_cache_after_step") == 0:
        settings["disable_cache_after_step"] = None
    return BY_TITLE[chosen["method"]](**settings)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"mag_ratios must be numbers, separated by commas, got {text[:80]!r}") from None


def _options() -> list[io.DynamicCombo.Option]:
    return [
        io.DynamicCombo.Option("First Block Cache", [
            _share("threshold", 0.05, "Change of the first block's effect below which the other blocks are left out."),
        ]),
        io.DynamicCombo.Option("TaylorSeer", [
            _count("cache_interval", 5, "A full step every so many steps; the others are extrapolated.", 1),
            _count("max_order", 1, "0 reuses, 1 extrapolates linearly, more with higher differences.", 0),
            _count("disable_cache_before_step", 3, "So many full steps first.", 1),
            io.Boolean.Input(
                "use_lite_mode", default=False, tooltip="Extrapolate only the result: least memory, less exact."
            ),
            _count("disable_cache_after_step", 0, "Only full steps from this one on. 0: never.", 0, advanced=True),
            io.Combo.Input(
                "taylor_factors_dtype", options=["bfloat16", "float16", "float32"], advanced=True,
                tooltip="Precision of what is kept.",
            ),
        ]),
        io.DynamicCombo.Option("Pyramid Attention Broadcast", [
            _count("spatial_attention_block_skip_range", 2, "Self-attention is computed every so many steps.", 1),
            _count("cross_attention_block_skip_range", 1, "The same for attention to the prompt. 1: every step.", 1),
            *_timesteps("spatial_attention_timestep_skip_range", 100, 800, "self-attention is reused"),
            *_timesteps("cross_attention_timestep_skip_range", 100, 800, "attention to the prompt is reused"),
        ]),
        io.DynamicCombo.Option("FasterCache", [
            _count("unconditional_batch_skip_range", 5, "The negative branch is computed every so many steps.", 1),
            _count("spatial_attention_block_skip_range", 2, "Self-attention is computed every so many steps.", 1),
            *_timesteps("unconditional_batch_timestep_skip_range", -1, 641, "the negative branch is left out"),
            *_timesteps("spatial_attention_timestep_skip_range", -1, 681, "self-attention is reused"),
            _share("attention_weight", 0.5, "How far attention is extrapolated from the last two.", advanced=True),
            _share("alpha_low_frequency", 1.1, "Growth of the branches' difference, coarse part.", advanced=True),
            _share("alpha_high_frequency", 1.1, "Growth of the branches' difference, fine part.", advanced=True),
            *_timesteps("low_frequency_weight_update_timestep_range", 99, 901, "the coarse part grows"),
            *_timesteps("high_frequency_weight_update_timestep_range", -1, 301, "the fine part grows"),
        ]),
        io.DynamicCombo.Option("MagCache", [
            _share("threshold", 0.06, "Error that may add up before a full step."),
            _count("max_skip_steps", 3, "At most so many steps left out in a row.", 0),
            _share("retention_ratio", 0.2, "Share of the steps, from the first on, that are always full."),
            io.String.Input(
                "mag_ratios", multiline=True,
                tooltip="The constants of this very model, one per step. Measure them once, as the help page says.",
            ),
        ]),
        io.DynamicCombo.Option("SeaCache", [
            _share("threshold", 0.25, "Change of the filtered latents that may add up before a full step."),
            _count("residual_order", 1, "0 reuses what the blocks did, 1 extrapolates it.", 0, 1),
            _count("max_consecutive_cached", 2, "At most so many steps left out in a row. 0: no limit.", 0),
            _count("retention_steps", 1, "So many full steps first.", 0, advanced=True),
            _count("cache_end_steps", 1, "So many full steps last.", 0, advanced=True),
            _share("power_exp", 3.0, "How steeply natural video falls off with frequency.", advanced=True),
        ]),
    ]  # fmt: skip


def _count(name, default, tooltip, low, high=1000, **options):
    return io.Int.Input(name, default=default, min=low, max=high, tooltip=tooltip, **options)


def _share(name, default, tooltip, **options):
    return io.Float.Input(name, default=default, min=0.0, max=10.0, step=0.01, round=False, tooltip=tooltip, **options)


def _timesteps(name, low, high, what):
    """The two ends of a range of timesteps; `to_method` puts them together."""
    return [
        io.Float.Input(
            f"{name}_{end}",
            default=value,
            min=-1.0,
            max=1001.0,
            step=1.0,
            advanced=True,
            tooltip=f"Timesteps (1000: pure noise, 0: clean) {word} which {what}.",
        )
        for end, value, word in (("low", low, "above"), ("high", high, "below"))
    ]
