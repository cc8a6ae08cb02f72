"""`mistral-chat quantize`: a checkpoint of floats, written once as FP8, int8 or int4."""
