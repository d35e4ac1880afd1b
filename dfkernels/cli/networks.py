"""A trained network that a user names on the command line: a function that returns it, or a file
that torch.export or TorchScript wrote."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from .._io.files import FileError, first_sentence
from ..methods.denoiser import Denoiser
from . import schedules

EXPORTED, SCRIPTED = (".pt2",), (".pt", ".pth", ".ts", ".jit")


def load(
    name: str, schedule: str | None, prediction_type: str | None, clock: float | None
) -> Denoiser:
    """The denoiser of a network, in eval mode. Runs the user's code.

    Args:
        name: `module:function` or `file.py:function`, a function without arguments that returns a
            `Denoiser`, an `nn.Module` or any callable `network(x, t)`; or a file, .pt2 of
            torch.export.save, else of torch.jit.save.
        schedule: As `schedules.parse` takes it. It and prediction_type are needed unless the
            function returns a `Denoiser`, with which neither they nor a clock may be given.
        prediction_type: As in `Denoiser`.
        clock: The network is given ``clock * t``; None for t itself.

    Raises:
        FileError: Whatever is wrong; the message starts with the name of the network or the option.
    """
    network = _network(name)
    options = {"--schedule": schedule, "--prediction-type": prediction_type, "--clock": clock}
    given = [option for option, value in options.items() if value is not None]
    if isinstance(network, Denoiser):
        if given:
            raise FileError(
                f"{name}: returned a Denoiser, which has its schedule, prediction type and clock:"
                f" leave out {', '.join(given)}"
            )
        return network.eval()
    if schedule is None or prediction_type is None:
        missing = [o for o in ("--schedule", "--prediction-type") if o not in given]
        raise FileError(f"{name}: is a network: {' and '.join(missing)} must say how to read it")
    if isinstance(network, nn.Module) and not isinstance(network, torch.fx.GraphModule):
        network.eval()  # an exported graph has only the mode in which it was exported
    time = None if clock is None else lambda t: clock * t
    return Denoiser(network, schedules.parse(schedule), prediction_type, clock=time)


def try_out(name: str, denoiser: Denoiser, x: Tensor) -> None:
    """Call the denoiser once per batch size, of states such as x [3, *E], before any long work.

    Raises:
        FileError: The network raises, or returns what is no prediction.
    """
    t = denoiser.schedule.t_of_log_snr(0.0)  # as much noise as signal
    for batch in (len(x), len(x) - 1):  # a graph may have been exported for one size
        try:
            with torch.no_grad():
                denoiser(x[:batch], t)
        except Exception as error:
            if str(error).startswith("network: "):  # says what it was given
                raise FileError(f"{name}: {_in_one_line(str(error))}") from None
            raise FileError(
                f"{name}: a call with x {list(x[:batch].shape)} and t [{batch}] failed:"
                f" {described(error)}"
            ) from None


def _network(name: str) -> Callable[..., object]:
    if Path(name).suffix.lower() in (*EXPORTED, *SCRIPTED):
        return _from_file(Path(name))
    where, _, function = name.rpartition(":")
    if not where or not function.isidentifier():
        raise FileError(
            f"{name}: expected module:function or file.py:function, a function that returns the"
            f" network, or a file {', '.join((*EXPORTED, *SCRIPTED))} of torch.export or"
            " TorchScript"
        )
    made = _called(name, _function(name, _module(name, where), function))
    if not callable(made):
        raise FileError(f"{name}: expected it to return a network, got {type(made).__name__}")
    return made


def _from_file(path: Path) -> nn.Module:
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    exported = path.suffix.lower() in EXPORTED
    try:
        with warnings.catch_warnings():
            # what torch thinks of the format is nothing that the user can change
            warnings.simplefilter("ignore")
            if exported:
                return torch.export.load(path).module()
            return torch.jit.load(path, map_location="cpu")
    except Exception as error:
        kind = "torch.export.save" if exported else "torch.jit.save"
        hint = "" if exported else " (of a file of weights, give file.py:function that loads them)"
        raise FileError(
            f"{path}: truncated, or no file of {kind}{hint}: {first_sentence(error)}"
        ) from None


def _module(name: str, where: str) -> ModuleType:
    """The module, imported as Python would a script's: from its folder, or from here."""
    path = Path(where)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise FileError(f"{where}: no such file")
    sys.path.insert(0, str(path.resolve().parent if is_file else Path.cwd()))
    try:
        if not is_file:
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(f"_network_{path.stem}", path.resolve())
        assert spec is not None and spec.loader is not None  # a .py file has them
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # where its classes are looked for
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        raise FileError(f"{name}: cannot be imported: {described(error)}") from None


def _function(name: str, module: ModuleType, function: str) -> Callable[[], object]:
    found = getattr(module, function, None)
    if found is None:
        own = [n for n, f in vars(module).items() if inspect.isfunction(f) and n[:1] != "_"]
        names = ", ".join(own[:12]) or "none"
        raise FileError(f"{name}: no function {function} there; functions: {names}")
    if not callable(found) or isinstance(found, nn.Module):
        raise FileError(
            f"{name}: expected a function that returns the network, got {type(found).__name__}"
        )
    needed = [
        p.name
        for p in inspect.signature(found).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise FileError(
            f"{name}: expected a function without arguments, got one that needs {', '.join(needed)}"
        )
    return found


def _called(name: str, function: Callable[[], object]) -> object:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise FileError(f"{name}: raised {described(error)}") from None


def described(error: BaseException) -> str:
    """An exception's type and message in one line, and where in the user's code it was raised."""
    kind, text = type(error).__name__, _in_one_line(str(error))
    line = f"{kind}: {text}" if text else kind
    frames = traceback.extract_tb(error.__traceback__)
    torch_folder, own_folder = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
    theirs = [f for f in frames if not f.filename.startswith((torch_folder, own_folder, "<"))]
    if isinstance(error, SyntaxError) or not theirs:  # whose message has the place
        return line
    return f"{line} ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})"


def _in_one_line(text: str) -> str:
    """The first line of a message, and where TorchScript interpreted, the one with its error."""
    first, *others = text.strip().splitlines() or [""]
    errors = [line for line in others if re.match(r"\w+Error: ", line)]
    return f"{first} {errors[-1]}" if "TorchScript" in first and errors else first
