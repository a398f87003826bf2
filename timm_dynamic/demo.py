"""A page in the browser: an image, a budget, and what a dynamic network does with it beside a dense one."""

import atexit
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from . import demo_page as page
from .cli.errors import BadInput
from .demo_compare import SAME_WEIGHTS, Comparison, load_pair
from .demo_samples import Sample, read_image, samples_for

__all__ = ["load_pair", "make_app", "serve"]

TITLE = "timm_dynamic: each image decides what runs"
LARGEST_FILE = 30_000_000  # bytes
KEPT_SECONDS = 3600  # how long uploaded images stay on the disk
WAITING = 64  # visitors in the queue
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
FONTS, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # of the visitor's own machine


def gradio() -> Any:
    """The package gradio, told to send nothing and to keep uploaded images where no other user of the machine looks.

    Raises:
        ImportError: if it is not installed.
    """
    os.environ.update(QUIET)
    os.environ.setdefault("GRADIO_TEMP_DIR", str(_folder() / "uploads"))
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the demo needs gradio ({error})") from error
    return gradio


@cache
def _folder() -> Path:
    """A folder of our own that is gone when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="timm-dynamic-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def show(compare: Comparison, path: str | None, setting: float | None) -> str:
    """What the page shows for an image file and a place of the slider, mistakes included.

    Args:
        compare: the networks.
        path: of the image; None if there is none.
        setting: of the slider; None if its field is empty.
    """
    if not path:
        return page.nothing_yet()
    value = compare.knob.within(setting)
    try:
        outcome = compare(read_image(path), value)
    except BadInput as error:
        return page.problem(str(error))
    return page.render(outcome, value if compare.knob.kind == "budget" else None)


def make_app(
    model: Any,
    dense: Any = None,
    about_dense: str = SAME_WEIGHTS,
    name: str | None = None,
    samples: Sequence[Sample] | None = None,
) -> Any:
    """The page as a `gradio.Blocks`, to be given to `serve`.

    Args:
        model: a dynamic model made by timm; it is not changed.
        dense: the stock model beside it; None for the model's own weights without gates.
        about_dense: what the dense model is, for the visitor.
        name: of the model, for the visitor.
        samples: images to pick from, one at least; None for what goes with the model's classes.

    Raises:
        BadInput: if the models cannot be compared.
        ImportError: if gradio is not installed.
    """
    gr = gradio()
    compare = Comparison(model, dense)
    found = list(samples if samples is not None else samples_for(compare.labels))
    files = _written(found)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        gr.HTML(page.introduction(name or compare.name, about_dense))
        _fill(gr, compare, found, files)
    return app.queue(max_size=WAITING, default_concurrency_limit=1)


def _written(samples: Sequence[Sample]) -> list[str]:
    """The samples as files."""
    folder = Path(tempfile.mkdtemp(prefix="samples-", dir=_folder()))
    files = [folder / f"{place}.png" for place in range(len(samples))]
    for sample, file in zip(samples, files, strict=True):
        sample.image.save(file)
    return [str(file) for file in files]


def _fill(gr: Any, compare: Comparison, samples: Sequence[Sample], files: Sequence[str]) -> None:
    """The page below its introduction: a new image or a moved slider gives a new result."""
    knob, (label, about) = compare.knob, page.knob_text(compare.knob)
    values = {"minimum": knob.low, "maximum": knob.high, "value": knob.start, "step": knob.step}
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image, gallery = _image(gr, files[0]), _gallery(gr, samples)
        with gr.Column(scale=5, min_width=320):
            slider = gr.Slider(**values, label=label, info=about, elem_id="budget")
            result = gr.HTML(show(compare, files[0], None), elem_id="result")

    def picked(event: Any) -> str:
        return files[event.index]

    def answer(path: str | None, setting: float | None) -> str:
        return show(compare, path, setting)

    picked.__annotations__ = {"event": gr.SelectData}  # gradio looks at these to know what to pass
    gallery.select(picked, None, image, show_progress="hidden", api_visibility="private")
    options = {"trigger_mode": "always_last", "show_progress": "minimal", "api_visibility": "private"}
    gr.on([image.change, slider.change], answer, [image, slider], result, **options)


def _image(gr: Any, first: str) -> Any:
    options = {"type": "filepath", "sources": ["upload", "clipboard"], "buttons": [], "height": 250}
    image = gr.Image(first, label="Image", elem_id="image", **options)
    image.preprocess = _path_only
    return image


def _path_only(payload: Any) -> str | None:
    """The uploaded file as it is; gradio would decode it, with error messages of its own."""
    return None if payload is None else payload.path


def _gallery(gr: Any, samples: Sequence[Sample]) -> Any:
    shown = [(page.thumbnail(sample.image, 160), sample.title) for sample in samples]
    options = {"height": "auto", "object_fit": "cover", "allow_preview": False, "buttons": [], "format": "png"}
    columns = 3 if len(samples) <= 6 else 5
    return gr.Gallery(shown, label="Samples", elem_id="samples", interactive=False, columns=columns, **options)


def serve(
    app: Any, host: str = "127.0.0.1", port: int | None = None, ready: Callable[[str], None] | None = None
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        app: from `make_app`.
        host: the address to listen on; other machines reach it only if this is not a loopback address.
        port: None for the first free one from 7860 on.
        ready: called with the page's address once it can be opened.

    Raises:
        OSError: if the port is taken.
    """
    gr = gradio()
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=MONO)
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    options = {"share": False, "inbrowser": False, "ssr_mode": False, "enable_monitoring": False, "pwa": False}
    app.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        max_file_size=LARGEST_FILE,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
        **options,
    )
    if ready is not None:
        ready(app.local_url)
    app.block_thread()
