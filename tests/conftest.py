"""One thread: the models of the tests are too small to share out, and results must not depend on the machine."""

import torch

torch.set_num_threads(1)
