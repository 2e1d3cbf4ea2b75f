"""What does one update of an average cost, against one copy of the weights and torch's `AveragedModel`?"""

from __future__ import annotations

import torch
from measuring import interleaved, ratios, save
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from interpolate import EMAAverager, SWAAverager

RUNS = 25


def main() -> None:
    import open_clip

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", pretrained=None).visual
    parameters = [p.detach() for p in model.parameters()]
    copies = [torch.zeros_like(p) for p in parameters]
    swa, ema = SWAAverager(model), EMAAverager(model)
    plain, multi = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    seconds = interleaved(
        {
            "copy": lambda: torch._foreach_copy_(copies, parameters),
            "SWAAverager": swa.update,
            "EMAAverager": ema.update,
            "AveragedModel": lambda: plain.update_parameters(model),
            "AveragedModel, multi_avg_fn": lambda: multi.update_parameters(model),
        },
        RUNS,
    )
    save("averaging_update", {"runs": RUNS, "model": "ViT-B/32", "time_over_copy": ratios(seconds, "copy")})


if __name__ == "__main__":
    main()
