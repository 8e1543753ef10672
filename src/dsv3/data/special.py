"""The special tokens of the released V3/R1 tokenizer: their strings, their order, their short names."""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
THINK = "<think>"
END_THINK = "</think>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
EOT = "<|EOT|>"
TOOL_CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
TOOL_CALLS_END = "<｜tool▁calls▁end｜>"
TOOL_CALL_BEGIN = "<｜tool▁call▁begin｜>"
TOOL_CALL_END = "<｜tool▁call▁end｜>"
TOOL_OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>"
TOOL_OUTPUTS_END = "<｜tool▁outputs▁end｜>"
TOOL_OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
TOOL_OUTPUT_END = "<｜tool▁output▁end｜>"
TOOL_SEP = "<｜tool▁sep｜>"

FIRST = (BOS, EOS, PAD)  # ids 0, 1, 2

# Added after the merges, in the released order, with the released `special` flag.
CONTROL = (
    (THINK, False), (END_THINK, False),
    (FIM_HOLE, False), (FIM_BEGIN, False), (FIM_END, False),
    (USER, False), (ASSISTANT, False), (EOT, True),
    (TOOL_CALLS_BEGIN, False), (TOOL_CALLS_END, False), (TOOL_CALL_BEGIN, False), (TOOL_CALL_END, False),
    (TOOL_OUTPUTS_BEGIN, False), (TOOL_OUTPUTS_END, False), (TOOL_OUTPUT_BEGIN, False),
    (TOOL_OUTPUT_END, False), (TOOL_SEP, False),
)  # fmt: skip

SHOWN = frozenset((THINK, END_THINK))  # reasoning tags are part of what a reader sees

NAMES = {
    "bos": BOS, "eos": EOS, "pad": PAD, "think": THINK, "end_think": END_THINK,
    "fim_hole": FIM_HOLE, "fim_begin": FIM_BEGIN, "fim_end": FIM_END,
    "user": USER, "assistant": ASSISTANT, "eot": EOT,
    "tool_calls_begin": TOOL_CALLS_BEGIN, "tool_calls_end": TOOL_CALLS_END,
    "tool_call_begin": TOOL_CALL_BEGIN, "tool_call_end": TOOL_CALL_END,
    "tool_outputs_begin": TOOL_OUTPUTS_BEGIN, "tool_outputs_end": TOOL_OUTPUTS_END,
    "tool_output_begin": TOOL_OUTPUT_BEGIN, "tool_output_end": TOOL_OUTPUT_END, "tool_sep": TOOL_SEP,
}  # fmt: skip
