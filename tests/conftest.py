import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("interpolate", deadline=None, max_examples=25)
hypothesis.settings.load_profile("interpolate")
