"""Chat templates written in the manner of the families that people align, with tokenizers that have their tokens.

Each is ours, short, and keeps one or more quirks of its family: where BOS stands, what ends a turn and whether any map
of special tokens names it, what the template does to white space, systems, tools and thinking. `FAMILIES` names them;
`tokenizer_of` makes a byte-level tokenizer with the family's tokens, or one that writes spaces as SentencePiece does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

PLAIN_TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN_CHATML = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# The system's text before the first user's, as templates without a system's turn have it.
FOLD = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}{% endfor %}"
)
THINK = (
    "{% macro split(text) %}{% if '</think>' in text %}{{ text.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ text }}{% endif %}{% endmacro %}"
)


@dataclass(frozen=True)
class Family:
    """A template and the tokens it takes."""

    template: str
    end: str  # what ends an answer
    eos: str
    bos: str = ""
    named: tuple[str, ...] = ()  # further tokens that the map of special tokens names
    added: tuple[str, ...] = ()  # added tokens that no map names
    learns: str = "all"  # "last": history is rendered otherwise, so only the last answer can be learned
    before: str = ""  # what the template writes before each answer, as the assistant's own
    behind: str = ""  # and between an answer and its end
    strips: bool = False  # white space around a message is taken off
    has_system: bool = True


# Thinks where the assistant answers the last user, and says so by a thought of its own or an empty one.
QWEN3 = (
    THINK + "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.index0 > last.user %}<think>\n"
    "{{ m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if m.reasoning_content or '</think>' in m.content else '' }}"
    "\n</think>\n\n{% endif %}{{ split(m.content) }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + OPEN_CHATML
)
FAMILIES = {
    "chatml": Family(PLAIN_TURN + OPEN_CHATML, "<|im_end|>", "<|im_end|>", named=("<|im_start|>",)),
    "chatml-base": Family(PLAIN_TURN + OPEN_CHATML, "<|im_end|>", "<|endoftext|>",
    added=("<|im_start|>", "<|im_end|>")),
    "chatml-default-system": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
        + PLAIN_TURN + OPEN_CHATML, "<|im_end|>", "<|im_end|>", named=("<|im_start|>",),
    ),
    "chatml-last-open": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if not loop.last or add_generation_prompt %}"
        "<|im_end|>\n{% endif %}{% endfor %}" + OPEN_CHATML, "<|im_end|>", "<|endoftext|>",
        added=("<|im_start|>", "<|im_end|>"),
    ),
    "llama2": Family(
        FOLD + "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.first and system %}<<SYS>>\n{{ system }}<</SYS>>\n\n{% endif %}{{ m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
        "</s>", "</s>", bos="<s>", strips=True, before=" ", behind=" ",
    ),
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>", "<|eot_id|>", bos="<|begin_of_text|>",
        added=("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"), strips=True,
    ),
    "llama3-dated": Family(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
        "{% for m in messages if m.role != 'system' %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>", "<|end_of_text|>", bos="<|begin_of_text|>",
        added=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), strips=True,
    ),
    "mistral1": Family(
        FOLD + "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}[INST] {% if loop.first %}{{ system }}"
        "{% endif %}{{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "</s>", "</s>", bos="<s>",
    ),
    "mistral3": Family(
        FOLD + "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}[INST] {{ system if loop.last else '' }}"
        "{{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        "</s>", "</s>", bos="<s>", added=("[INST]", "[/INST]"), strips=True, before=" ",
        has_system=False,  # it stands with the last user's message, so the history changes
    ),
    "mistral-tekken": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "</s>", "</s>", bos="<s>", added=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "gemma2": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>", "<eos>", bos="<bos>", named=("<start_of_turn>", "<end_of_turn>"),
        strips=True, has_system=False,
    ),
    "gemma3": Family(
        FOLD + "{{ bos_token }}{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ system if loop.first else '' }}"
        "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text | trim }}"
        "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>", "<eos>", bos="<bos>", added=("<start_of_turn>", "<end_of_turn>"), strips=True,
    ),
    "phi3.5": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>", "<|endoftext|>", added=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "phi4": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        "<|im_end|>", "<|endoftext|>", added=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "qwen2.5": Family(
        "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
        "{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
        "</tool_response><|im_end|>\n{% elif m.role != 'system' or not tools %}<|im_start|>{{ m.role }}"
        "\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
        "{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments | tojson }}}\n</tool_call>"
        "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}" + OPEN_CHATML,
        "<|im_end|>", "<|im_end|>", named=("<|im_start|>",), added=("<tool_call>", "</tool_call>"),
    ),
    "qwen3": Family(
        QWEN3 + "{% if add_generation_prompt and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
        "<|im_end|>", "<|im_end|>", named=("<|im_start|>",), added=("<think>", "</think>"), learns="last",
        before="<think>\n\n</think>\n\n",
    ),
    "qwen3.5": Family(
        QWEN3 + "{% if add_generation_prompt %}<think>\n{% endif %}",
        "<|im_end|>", "<|im_end|>", named=("<|im_start|>",), added=("<think>", "</think>"), learns="last",
        before="\n</think>\n\n",
    ),
    "deepseek2": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n"
        "{% elif m.role == 'system' %}{{ m.content }}\n\n{% else %}Assistant: {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        "<eos>", "<eos>", bos="<bos>", before=" ",
    ),
    "deepseek3": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% elif m.role == 'assistant' and m.content is none %}<|Assistant|>{% for c in m.tool_calls %}<|call|>"
        "{{ c.function.name + '\n' + c.function.arguments }}{% endfor %}<eos>"
        "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}<eos>"
        "{% elif m.role == 'tool' %}<|result|>{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}",
        "<eos>", "<eos>", bos="<bos>", added=("<|User|>", "<|Assistant|>", "<|call|>", "<|result|>"),
    ),
    "deepseek-r1": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<eos>"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<eos>", "<eos>", bos="<bos>", added=("<|User|>", "<|Assistant|>", "<think>", "</think>"), learns="thinking",
    ),
    "glm4": Family(
        "[gMASK]<sop>{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}\n{{ c.function.arguments | tojson }}"
        "{% endfor %}{% else %}{{ '\n' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<|assistant|>{% endif %}",
        "<|user|>", "<|endoftext|>",
        added=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
        before="\n",
    ),
    "falcon3": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}"
        "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|endoftext|>", "<|endoftext|>", added=("<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "zephyr": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "</s>", "</s>", bos="<s>",
    ),
    "command-r": Family(
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ {'user': 'USER', 'system': 'SYSTEM'}"
        ".get(m.role, 'CHATBOT') }}_TOKEN|>{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>", strips=True,
        added=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    "command-a": Family(
        "{{ bos_token }}{% for m in messages %}<|START|>{{ m.role }}|{% if m.role == 'assistant' %}<|START_RESPONSE|>"
        "{{ m.content }}<|END_RESPONSE|>{% else %}{{ m.content }}{% endif %}<|END_OF_TURN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START|>assistant|{% endif %}",
        "<|END_OF_TURN|>", "<|END_OF_TURN|>", bos="<BOS>",
        added=("<|START|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        before="<|START_RESPONSE|>", behind="<|END_RESPONSE|>",
    ),
    "harmony": Family(
        "<|start|>system<|message|>Today: {{ strftime_now('%Y-%m-%d') }}<|end|>"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|return|>", "<|return|>", added=("<|start|>", "<|message|>", "<|channel|>", "<|end|>"), learns="last",
        before="<|channel|>final<|message|>",
    ),
    "olmo2": Family(
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}"
        "{% if not loop.last %}{{ eos_token }}\n{% else %}{{ eos_token }}{% endif %}{% else %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|endoftext|>", "<|endoftext|>", bos="<|endoftext|>",
    ),
    "marked": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + OPEN_CHATML,
        "<|im_end|>", "<|im_end|>", named=("<|im_start|>",),
    ),
    "marked-without-end": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>", "<|endoftext|>", added=("<|user|>", "<|assistant|>", "<|system|>"),
    ),
}  # fmt: skip


@lru_cache(maxsize=64)
def tokenizer_of(name: str, *, spaces: str = "byte"):
    """Return a family's tokenizer: byte-level, or with spaces as SentencePiece writes them ("first" or "always")."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    tokens = list(
        dict.fromkeys(["<pad>", *filter(None, (family.bos, family.eos, family.end)), *family.named, *family.added])
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if spaces != "byte":
        alphabet = ["▁", *map(chr, range(33, 127)), "\n", "é", "中", "▁a", "ab", "\na", ":y", "]a"]
    vocab = {token: index for index, token in enumerate(["<unk>", *tokens, *alphabet])}
    merges = [] if spaces == "byte" else [("▁", "a"), ("a", "b"), ("\n", "a"), (":", "y"), ("]", "a")]
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if spaces == "byte":
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
        raw.decoder = decoders.Metaspace(prepend_scheme=spaces, split=False)
    raw.add_special_tokens(tokens)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=family.eos, pad_token="<pad>", unk_token="<unk>", bos_token=family.bos or None,
        extra_special_tokens=list(family.named),
    )  # fmt: skip
    made.chat_template = family.template
    return made
