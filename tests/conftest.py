"""Settings for all tests: threads pinned, so that numbers and times do not depend on the machine's load."""

import torch

torch.set_num_threads(1)
