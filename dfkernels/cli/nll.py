"""`dfkernels nll`: the likelihood of a pipeline's samples against guidance, and across seeds."""

from __future__ import annotations

import argparse
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .._io import files
from .._io.files import FileError
from ..adapt import pipelines
from ..methods import guided_likelihood as nll
from . import arguments
from .progress import progress

_GUIDANCE = (1.0, 2.0, 4.0, 8.0)
_SEEDS = list(range(8))


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "nll",
        help="likelihood of a diffusers pipeline's samples, against guidance and across seeds",
        description=(
            "Samples a pipeline at each guidance scale from the noise of each seed, and computes"
            " the negative log-likelihood of every sample. PIPELINE is a folder as"
            " save_pretrained writes it; nothing is downloaded. Supported are"
            f" {', '.join(pipelines.PIPELINES)}. The result is a JSON file that a run which was"
            " killed goes on from."
        ),
    )
    _add_samples(parser)
    _add_likelihood(parser)
    parser.add_argument(
        "--batch", type=arguments.count, default=8, help="samples computed together (default: 8)"
    )
    parser.add_argument(
        "--device", type=_device, default=None, help="(default: cuda where there is one, else cpu)"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("nll.json"), help="result (default: nll.json)"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="figure, as a PNG")
    parser.set_defaults(run=_run)


def _add_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", metavar="PIPELINE", type=Path, help="folder of the pipeline")
    parser.add_argument("--prompt", metavar="TEXT", help="condition of a text-to-image pipeline")
    parser.add_argument("--label", type=int, metavar="N", help="class of a class-to-image pipeline")
    parser.add_argument(
        "--guidance",
        type=arguments.number,
        nargs="+",
        metavar="W",
        help="guidance scales (default: 1 2 4 8, or 1 for a pipeline without guidance)",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        nargs="+",
        default=[_SEEDS],
        metavar="N",
        help="seeds of the noise, or ranges of them such as 0-15 (default: 0-7)",
    )
    parser.add_argument(
        "--steps", type=arguments.count, default=50, help="of Heun's sampler (default: 50)"
    )


def _add_likelihood(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--under",
        choices=nll.UNDER,
        default="model",
        help=(
            "the flow whose density it is: the model's own, at guidance 1, or the guided one that"
            " made the sample (default: model)"
        ),
    )
    parser.add_argument(
        "--noise",
        type=arguments.positive,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="levels sigma/alpha (default: those of the scheduler's table, up to 100)",
    )
    parser.add_argument(
        "--likelihood-steps",
        type=arguments.count,
        metavar="N",
        help=(
            "equal steps of the likelihood's solver, of order 4 (default: steps chosen by their"
            " errors)"
        ),
    )
    parser.add_argument(
        "--probes",
        type=arguments.count,
        default=2,
        help="random probes of the trace; from two on their error is known (default: 2)",
    )


def _seeds(text: str) -> list[int]:
    if not (found := re.fullmatch(r"(\d+)(?:-(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"expected a seed or a range such as 0-15, got {text!r}")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first or last - first >= 10**6:
        raise argparse.ArgumentTypeError(f"expected a range such as 0-15, got {text!r}")
    return list(range(first, last + 1))


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, dtype=torch.float32, device=text).device
    except (RuntimeError, AssertionError) as error:
        why = files.first_sentence(error)
        raise argparse.ArgumentTypeError(f"cannot compute on {text!r}: {why}") from None


def _run(args: argparse.Namespace) -> int:
    if args.figure is not None:
        from .._page.extra import require

        require("report", ("matplotlib",))
        files.prepare(args.figure)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pipeline = _loaded(args.pipeline).to(device)
        flows = pipelines.from_pipeline(pipeline, prompt=args.prompt, label=args.label)
        rows = _rows(args, flows, _configuration(args, pipeline), device)
    except FileError:
        raise
    except ValueError as error:  # names the argument at fault
        raise FileError(str(error)) from None
    except RuntimeError as error:
        if str(error).startswith("log_prob: gave up"):
            where = str(error).partition(": ")[2].partition(": ")[0]
            raise FileError(f"{where}: take --likelihood-steps, or a higher --noise") from None
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise FileError("not enough memory: a smaller --batch needs less") from None
        raise
    _print(args.under, flows.latents, rows)
    print(f"written: {args.out}")
    if args.figure is not None:
        from .nll_figure import png

        files.write(args.figure, lambda file: file.write(png(rows, args.under, flows.latents)))
        print(f"written: {args.figure}")
    return 0


def _rows(
    args: argparse.Namespace,
    flows: pipelines.PipelineFlows,
    configuration: dict[str, object],
    device: torch.device,
) -> list[nll.GuidedSample]:
    with progress("nll", "steps") as step:
        return nll.guided_likelihood(
            flows.denoiser_at,
            flows.shape,
            args.guidance or (_GUIDANCE if flows.guided else (1.0,)),
            [seed for some in args.seeds for seed in some],
            tuple(args.noise) if args.noise else flows.noise,
            under=args.under,
            sampling_steps=args.steps,
            probes=args.probes,
            method="rk4" if args.likelihood_steps else "dopri5",
            steps=args.likelihood_steps,
            batch=args.batch,
            device=device,
            checkpoint=args.out,
            configuration=configuration,
            callback=step,
        )


def _loaded(folder: Path) -> Any:
    """The pipeline in a folder, on the CPU.

    Raises:
        FileError: It is no pipeline, or one that is not supported.
        ModuleNotFoundError: diffusers is not installed.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileError(
            f"{folder}: expected a folder with the pipeline that save_pretrained writes, got"
            f" {'one without model_index.json' if folder.is_dir() else 'no folder'}"
        )
    try:
        parts = dict(json.loads(index.read_text()))
        pipelines.supported(parts["_class_name"])
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileError(f"{index}: unreadable: {files.first_sentence(error)}") from None
    missing = [name for name in ("diffusers", "transformers") if find_spec(name) is None]
    if "diffusers" in missing:
        raise ModuleNotFoundError(f"not installed: pip install {' '.join(missing)}")
    import diffusers

    # what was left out when it was saved, such as Stable Diffusion 3's largest text encoder
    absent = {name: None for name, entry in parts.items() if entry == [None, None]}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent)
    except Exception as error:  # parsers of damaged files raise whatever comes to their mind
        why = files.first_sentence(error)
        raise FileError(f"{folder}: diffusers cannot load it: {why}") from None


def _configuration(args: argparse.Namespace, pipeline: Any) -> dict[str, object]:
    """What decides the rows beside the arguments of `guided_likelihood`."""
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    return {
        "pipeline": type(pipeline).__name__,
        "weights": f"{files.checksums(network.state_dict().values()):08x}",
        "scheduler": type(pipeline.scheduler).__name__,
        "prompt": args.prompt,
        "label": args.label,
    }


def _print(under: str, latents: bool, rows: list[nll.GuidedSample]) -> None:
    what = "the autoencoder's latents, not of images" if latents else "images in [-1, 1]"
    whose = "the model's own flow" if under == "model" else "the guided flow of each row"
    print(f"negative log-likelihood of {what}, under {whose}")
    head = (
        "guidance",
        "seeds",
        "nats/number",
        "standard error",
        "bits/dim",
        "integration",
        "trace",
    )
    print("  ".join(f"{name:>14}" for name in head))
    for at in nll.summarised(rows):
        cells = (
            *(f"{at.scale:g}", str(at.seeds), f"{at.nll:.5f}", f"{at.standard_error:.2g}"),
            *(f"{at.nll / math.log(2):.5f}", f"{at.integration_error:.1g}"),
            f"{at.trace_error:.1g}",
        )
        print("  ".join(f"{cell:>14}" for cell in cells))
