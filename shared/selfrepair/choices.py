"""What users choose from by name; light, so that a wrong name is answered at once."""

#: What takes a head's place: its output on another prompt, its mean, or nothing (Rushing & Nanda 2024, §2 and appendix).
ABLATIONS = ("resample", "mean", "zero")
#: What weights are stored and multiplied in; ``tf32`` are float32 weights whose products a GPU computes in TF32.
PRECISIONS = ("float64", "float32", "tf32", "bfloat16", "float16")
