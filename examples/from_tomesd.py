"""Coming from tomesd: the same call, then what this package adds."""

import torch

from tomesd_plus import apply_token_merging, load_tiny_pipeline, tomesd

pipe = load_tiny_pipeline()
prompt = "a large red apple on a yellow background"

tomesd.apply_patch(pipe, ratio=0.5)  # the same arguments and, on a CPU, the same bits as tomesd 0.1.3
pipe(prompt, generator=torch.Generator().manual_seed(0)).images[0].save("tomesd.png")
tomesd.remove_patch(pipe)

apply_token_merging(pipe, ratio=0.5)  # proportional attention; the same picture every time
pipe(prompt, generator=torch.Generator().manual_seed(0)).images[0].save("tomesd_plus.png")
