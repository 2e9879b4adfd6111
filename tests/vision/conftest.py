import transformers

if int(transformers.__version__.partition(".")[0]) < 5:  # where merging in towers is refused
    collect_ignore_glob = ["test_*.py"]
