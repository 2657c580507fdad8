from comfy_api.latest import io

from ..rolling_kv.step_cache import METHODS, Knob, StepCacheMethod
from .guard import guarded
from .types import CATEGORY, Model

FIRST = ("firstblock", "taylorseer")
"""These methods stand before the others: they work anywhere, without constants and with every diffusers."""
BY_TITLE = {method.title: method for method in sorted(METHODS.values(), key=lambda method: method.name not in FIRST)}


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
                *(alias for method in METHODS.values() for alias in method.aliases),
                "speed up",
            ],
            inputs=[
                Model.Input("model", tooltip="From Load Causal Video Model or Attach Rolling Cache."),
                io.DynamicCombo.Input(
                    "method",
                    options=[
                        io.DynamicCombo.Option(
                            title, [_input(part) for knob in method.knobs() for part in knob.parts()]
                        )
                        for title, method in BY_TITLE.items()
                    ],
                    tooltip="How to tell what can be left out. The help page says what each method does and costs.",
                ),
            ],
            outputs=[Model.Output(display_name="model", tooltip="The model with this step cache, for Sample Video.")],
            accept_all_inputs=True,
        )

    @classmethod
    def validate_inputs(cls, model, method=None) -> bool | str:
        # ComfyUI leaves out a dynamic combo whose value is none of its choices, or gives the bare value.
        return True if isinstance(method, dict) else f"method must be one of {', '.join(BY_TITLE)}"

    @classmethod
    @guarded
    def execute(cls, model, method) -> io.NodeOutput:
        return io.NodeOutput(model._replace(step_cache=to_method(method)))


def to_method(chosen: dict) -> StepCacheMethod:
    """The engine's method for what the combo gives: its title under "method", and its settings."""
    return BY_TITLE[chosen["method"]].from_values(chosen)


def _input(part: Knob) -> io.Input:
    shown = dict(tooltip=part.tooltip, optional=part.advanced, advanced=part.advanced or None)
    bounds = dict(default=part.default or 0, min=part.low, max=part.high)
    if part.kind == "count":
        return io.Int.Input(part.name, **bounds, **shown)
    if part.kind in ("share", "timestep"):
        bounds = {name: value if name == "default" else float(value) for name, value in bounds.items()}
        return io.Float.Input(
            part.name, **bounds, step=float(part.step), round=None if part.step == 1 else False, **shown
        )
    if part.kind == "switch":
        return io.Boolean.Input(part.name, default=part.default, **shown)
    if part.kind == "choice":
        return io.Combo.Input(part.name, options=list(part.choices), **shown)
    return io.String.Input(part.name, multiline=True, **shown)
