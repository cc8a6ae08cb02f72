"""Without a GPU nothing here is imported: Triton's kernels would be made for one, in all tests."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
