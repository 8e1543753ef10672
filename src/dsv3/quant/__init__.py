"""Other number formats for the model's matrices, put in from outside (floor 3).

``fp8``: training; ``frozen``: weights that stay as an FP8 checkpoint has them; ``packed``: INT8 and INT4, or
dense, to run on a CPU.
"""
