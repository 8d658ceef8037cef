"""Marks for tests where a warning of fim-lora is right but not the subject. Elsewhere it is an error (conftest.py)."""

import pytest

FEWER_BATCHES = pytest.mark.filterwarnings("ignore:The dataloader yielded")
NOT_FINITE = pytest.mark.filterwarnings("ignore:.* calibration batches had a loss or gradients that are not finite")
SAVED_WITHOUT_RANKS = pytest.mark.filterwarnings("ignore:This adapter never got its FIM ranks")
SEVERAL_FORWARD_PASSES = pytest.mark.filterwarnings("ignore:The model was called several times before one backward")
UNATTRIBUTED = pytest.mark.filterwarnings("ignore:The inputs of .* layers could not be attributed to examples")
UNCERTAIN_BATCH_SIZE = pytest.mark.filterwarnings("ignore:The batches do not show how many examples they hold")
UNCERTAIN_ROWS = pytest.mark.filterwarnings("ignore:The rows of the inputs of .* could belong to the examples")
UNREACHED = pytest.mark.filterwarnings("ignore:.* target layers took no part in the loss of any calibration batch")
WITHOUT_RANKS = pytest.mark.filterwarnings("ignore:Adapter 'default' is trained without FIM ranks")
