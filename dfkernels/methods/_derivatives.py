"""What a network does that PyTorch cannot differentiate, said in the words of the argument that
asked for the derivative.

PyTorch's fused attention has no forward-mode derivative, and a second one in its MATH backend only;
checkpointed activations do not work under torch.func. A network that computes under torch.no_grad,
or from x.detach(), has a derivative of 0 without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .._torch import private
from .._torch.errors import Unsupported

__all__ = ["explained", "refuse_cut"]

_ASKED: ContextVar[str | None] = ContextVar("what asks for a derivative", default=None)

_FORWARD = re.compile(r"forward AD with (\S+) that does not support it")
_SECOND = re.compile(r"derivative for (\S*attention\S*_backward) is not implemented")
# of checkpoint(use_reentrant=False) and of use_reentrant=True
_UNDER_TRANSFORMS = ("support saved tensor hooks", "override the setup_context")


@contextmanager
def explained(argument: str, mode: str) -> Iterator[None]:
    """Replaces PyTorch's error for a derivative of a network that it does not have, and no other.

    Args:
        argument: the name of the argument that takes "vjp" or "jvp".
        mode: its value.

    Raises:
        Unsupported: The network calls attention or checkpoints its activations where that cannot be
            differentiated, or cuts its derivative; the message says what to write instead.
    """
    asked = _ASKED.set(f'{argument}="{mode}"')
    try:
        yield
    except RuntimeError as error:
        # what the network raised is the cause of an error that says what it was given
        first = error.__cause__ if isinstance(error.__cause__, RuntimeError) else error
        reason = _reason(first, f'{argument}="vjp"' if mode == "jvp" else None)
        if reason is None:
            raise
        raise Unsupported(f'{argument}="{mode}": {reason}') from first
    finally:
        _ASKED.reset(asked)


def refuse_cut(network: Callable[[Tensor], Tensor], x: Tensor, out: Tensor) -> None:
    """Refuses the output of a network at x from which nothing leads back to x, in the block of
    `explained`, although the network depends on x: its output elsewhere is another one.
    """
    asked = _ASKED.get()
    if asked is None or not private.is_tracked(x) or private.is_tracked(out):
        return
    if private.is_fake(out) or not out.is_floating_point():  # no values; refused in other words
        return
    with torch.no_grad():
        here, elsewhere = map(private.fully_unwrapped, (out, network(x / 2 + 0.125)))
        change = (elsewhere - here).abs() if here.shape == elsewhere.shape else here.new_zeros(())
    if bool(((change > 0) & change.isfinite()).any()):
        raise Unsupported(
            f"{asked}: the network depends on x, but its derivative is cut, as by torch.no_grad(), "
            "torch.inference_mode() or x.detach() in it: call it without"
        )


def _reason(error: RuntimeError, reverse: str | None) -> str | None:
    said = str(error)
    if reverse and (found := _FORWARD.search(said)):
        return (
            f"the network calls {_named(found[1])}, which has no forward-mode derivative in "
            f"PyTorch; take {reverse}"
        )
    if found := _SECOND.search(said):
        return (
            f"the network takes a derivative itself, and {_named(found[1])} has none in PyTorch; "
            "call within torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )
    if _from_checkpoint(error) and any(words in said for words in _UNDER_TRANSFORMS):
        return (
            "the network checkpoints its activations (torch.utils.checkpoint), which PyTorch "
            "cannot do under torch.func; switch gradient checkpointing off for this call"
        )
    return None


def _named(op: str) -> str:
    return f"{op} (attention, SDPA)" if "attention" in op else op


def _from_checkpoint(error: RuntimeError) -> bool:
    """Whether torch.utils.checkpoint called what of torch.autograd raised the error."""
    caller, frame = "", error.__traceback__
    while frame is not None:
        module = frame.tb_frame.f_globals.get("__name__", "")
        caller, frame = caller if module.startswith("torch.autograd") else module, frame.tb_next
    return caller == "torch.utils.checkpoint"
