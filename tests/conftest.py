import os
import signal

import hypothesis
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` leaves it, to the processes of tests, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
hypothesis.settings.register_profile("interpolate", deadline=None, max_examples=25)
quick = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # that an example fails is enough, it need not be small
hypothesis.settings.register_profile("mutants", deadline=None, max_examples=25, phases=quick, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "interpolate"))
