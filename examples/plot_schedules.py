"""Draw the schedules at one mean, in both directions, and quantized to few ratios for torch.compile."""

from matplotlib.figure import Figure

from tomesd_plus import ConstantSchedule, CosineSchedule, LinearSchedule

figure = Figure(figsize=(6, 3.5), layout="constrained")
ax = figure.subplots()
cosine = CosineSchedule(noisy=0.7, clean=0.3)
ConstantSchedule(0.5).plot(ax, label="constant")
LinearSchedule(noisy=0.7, clean=0.3).plot(ax, label="linear")
cosine.plot(ax, label="cosine")
cosine.reversed().plot(ax, label="cosine, more at clean steps")
cosine.quantized(4).plot(ax, label="cosine in 4 plateaus")
ax.legend()
figure.savefig("schedules.png", dpi=150)
