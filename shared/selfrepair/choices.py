"""What users choose from by name; light, so that a wrong name is answered at once."""

#: What weights are stored and multiplied in; ``tf32`` are float32 weights whose products a GPU computes in
#: TF32.
PRECISIONS = ("float64", "float32", "tf32", "bfloat16", "float16")
#: Positions at which whole layers are ablated.
LAYER_POSITIONS = ("last", "all")
