"""What the calibration batches covered: the errors and warnings that every statistic has in common."""

from collections.abc import Collection, Iterable

from ..runtime.user_warnings import warn_user

NO_BATCH_SEEN = (
    "No calibration batch was seen: call `model(**batch).loss.backward()` on some batches first, or pass `dataloader` "
    "or `fim_scores` to a function that takes them."
)
CAUSES_OF_NO_GRADIENT = (
    "Usual causes: the batches have no labels; the loss is detached, or was computed without gradients "
    "(`torch.no_grad`); all labels are masked (-100); the target layers do not take part in the loss; or reentrant "
    "gradient checkpointing cuts the graph because no input requires a gradient (pass `use_reentrant=False`, or "
    "call `model.enable_input_require_grads()`)."
)


def require_usable_batches(num_batches: int, num_skipped: int) -> None:
    """Raise `RuntimeError` if no batch was seen, or every one was skipped: its loss or a gradient was not finite."""
    if num_batches == 0:
        raise RuntimeError(NO_BATCH_SEEN)
    if num_batches == num_skipped:
        raise RuntimeError(
            f"All {num_batches} calibration batches had a loss or gradients that are not finite: calibrate in "
            "bfloat16 or float32, scale the loss down, or look for NaN and for batches without labels in the data."
        )


def warn_of_skipped_batches(num_batches: int, num_skipped: int, where: str = "") -> None:
    """Warn if some batches were skipped; `where` says for which layers."""
    if num_skipped:
        warn_user(
            f"{num_skipped} of {num_batches} calibration batches had a loss or gradients that are not finite, and "
            f"were left out{where}. To use them all, calibrate in bfloat16 or float32, and remove batches without "
            "labels.",
        )


def warn_of_unattributed_layers(names: Collection[str], result: str, consequence: str = "") -> None:
    """Warn of layers whose rows could not be attributed to examples; `result` names what is exact otherwise."""
    if names:
        warn_user(
            f"The inputs of {len(names)} layers could not be attributed to examples, so each of their batches counts "
            f"as one example{consequence}: {sorted(names)}. Calibrate with batches of one example for exact {result}.",
        )


def warn_of_unreached_layers(
    names: Iterable[str], reached: Collection[str], kind: str, consequence: str, fix: str
) -> None:
    """Warn of layers that took part in no loss. `kind` is how the layers are called."""
    unreached = [name for name in names if name not in reached]
    if unreached:
        warn_user(
            f"{len(unreached)} {kind} took no part in the loss of any calibration batch{consequence}: {unreached}. "
            f"{fix}",
        )
