"""Programs in the notation of the TPU compiler, small enough to be counted by hand."""

HEAD = "HloModule jit_step, is_scheduled=true, num_partitions={devices}\n"

ADD = """
%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%a, %b)
}
"""

# A loop from `start` while the counter is `direction` the bound, which its tuple hands through.
LOOP = """
%body (state: (s32[], s32[], bf16[64,256])) -> (s32[], s32[], bf16[64,256]) {{
  %state = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, bf16[64,256]{{1,0:T(8,128)(2,1)}}) parameter(0)
  %count = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %step = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)}} add(%count, %step)
  %bound = s32[]{{:T(128)}} get-tuple-element(%state), index=1
  %x = bf16[64,256]{{1,0:T(8,128)(2,1)}} get-tuple-element(%state), index=2
  {operation}
  ROOT %turned = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, bf16[64,256]{{1,0:T(8,128)(2,1)}}) tuple(%next, %bound, %y)
}}

%condition (state.1: (s32[], s32[], bf16[64,256])) -> pred[] {{
  %state.1 = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, bf16[64,256]{{1,0:T(8,128)(2,1)}}) parameter(0)
  %count.1 = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  %bound.1 = s32[]{{:T(128)}} get-tuple-element(%state.1), index=1
  ROOT %goes_on = pred[]{{:T(512)}} compare(%count.1, %bound.1), direction={direction}
}}

ENTRY %main (params: bf16[64,256], bound.2: s32[]) -> bf16[64,256] {{
  %params = bf16[64,256]{{1,0:T(8,128)(2,1)}} parameter(0), metadata={{op_name="state.params[\\'core\\'][\\'up\\']"}}
  %bound.2 = s32[]{{:T(128)}} parameter(1), metadata={{op_name="depth"}}
  %start = s32[]{{:T(128)}} constant({start})
  %last = s32[]{{:T(128)}} constant({last})
  %copy.1 = s32[]{{:T(128)}} copy(%{bound})
  %first = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, bf16[64,256]{{1,0:T(8,128)(2,1)}}) tuple(%start, %copy.1, %params)
  %while.1 = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, bf16[64,256]{{1,0:T(8,128)(2,1)}}) while(%first), condition=%condition, body=%body, metadata={{op_name="jit(step)/core/while"}}
  ROOT %result = bf16[64,256]{{1,0:T(8,128)(2,1)}} get-tuple-element(%while.1), index=2
}}
"""  # noqa: E501 - HLO has an operation per line.

NOTHING = "%y = bf16[64,256]{1,0:T(8,128)(2,1)} negate(%x)"


def looping(operation: str = NOTHING, *, devices: int = 1, before: str = "", **loop: object) -> str:
    """A program with one loop around an operation that makes %y of %x, both bf16[64,256]."""
    settings = {"start": 0, "last": 4, "step": 1, "direction": "LT", "bound": "last"}
    text = LOOP.format(operation=operation, **(settings | loop))
    return HEAD.format(devices=devices) + ADD + before + text


def straight(operations: str, *, devices: int = 1, before: str = "", header: str = "") -> str:
    """A program without a loop; `operations` are those of its entry."""
    head = HEAD.format(devices=devices).replace("\n", f"{header}\n")
    lines = "\n".join(f"  {line.strip()}" for line in operations.strip().splitlines())
    return f"{head}{ADD}{before}\nENTRY %main (x: f32[]) -> f32[] {{\n{lines}\n}}\n"
