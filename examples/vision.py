"""Speed a vision tower up: here the embedded CLIP, at work on a picture of the embedded pipeline."""

from transformers import pipeline

from tomesd_plus import apply_token_merging, load_tiny_pipeline, remove_token_merging
from tomesd_plus.tiny import TINY_CLIP

picture = load_tiny_pipeline()("a large star on a blue background", num_inference_steps=10).images[0]
classify = pipeline("zero-shot-image-classification", model=str(TINY_CLIP))  # or a ViT, DeiT, SigLIP, DINOv2, DINOv3
labels = ["a large star on a blue background", "a large moon on a blue background", "a large cat on a red background"]
print("untouched:", classify(picture, candidate_labels=labels)[0])

report = apply_token_merging(classify, r=8)  # eight tokens fewer after each layer
print("merged:   ", classify(picture, candidate_labels=labels)[0])
print(report)
report.source_picture(picture.resize((512, 512))).save("vision.png")  # which patches went together

remove_token_merging(classify)
