"""Prompt files that are wrong: what the file holds, the settings it is read with, and words of its error."""

from dataclasses import dataclass

RAW = ("prompts.template=raw",)
CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


@dataclass(frozen=True)
class PromptCase:
    """One prompt file; the third line of it is wrong unless the whole file is."""

    content: bytes
    says: str
    overrides: tuple[str, ...] = RAW
    template: str | None = None


def _raw(line: bytes | str, says: str, *overrides: str) -> PromptCase:
    encoded = line if isinstance(line, bytes) else line.encode()
    good = b'{"prompt": "w4"}\n'
    return PromptCase(good * 2 + encoded + b"\n" + good, f"prompts.jsonl:3: {says}", (*RAW, *overrides))


def _chat(line: str, says: str, template: str | None = CHAT) -> PromptCase:
    return PromptCase(line.encode() + b"\n", f"prompts.jsonl:1: {says}", (), template)


def _messages(*messages: str) -> str:
    return '{"prompt": [' + ", ".join(messages) + "]}"


ONE = '{"prompt": "w4"}'
PROMPTS: dict[str, PromptCase] = {
    "empty file": PromptCase(b"", "prompts.jsonl: the file holds no prompt"),
    "line break alone": PromptCase(b" \n\n", "prompts.jsonl: the file holds no prompt"),
    "utf-8 mark": PromptCase(b"\xef\xbb\xbf" + ONE.encode(), "byte order mark"),
    "utf-16": PromptCase(ONE.encode("utf-16"), "byte order mark"),
    "utf-16 without mark": PromptCase(ONE.encode("utf-16-le"), "prompts.jsonl:1: not a prompt object"),
    "old line ends": PromptCase(f"{ONE}\r{ONE}".encode(), "prompts.jsonl:1: not a prompt object"),
    "Parquet": PromptCase(b"PAR1\x15\x04\x15\x10", "prompts.jsonl: cannot read the Parquet file"),
    "gzip": PromptCase(b"\x1f\x8b\x08\x00\x00", "prompts.jsonl: cannot unpack the prompt file: Compressed file ended"),
    "JSON array cut": PromptCase(f"[\n{ONE},\n".encode(), "prompts.jsonl: not a JSON array of prompt objects"),
    "JSON array of texts": PromptCase(b'["w4"]', "prompts.jsonl: row 1: not a prompt object: Expected `object`"),
    "pretty-printed": PromptCase(b'{\n  "prompt": "w4"\n}\n', "prompts.jsonl:1: not a prompt object"),
    "CSV": PromptCase(b"prompt,answer\nw4,w5\n", "prompts.jsonl:1: not a prompt object"),
    "cut in a text": _raw('{"prompt": "w4', "not a prompt object"),
    "cut after a key": _raw('{"prompt":', "not a prompt object"),
    "cut in a character": _raw(b'{"prompt": "w4 \xc3', "not a prompt object"),
    "not JSON": _raw("hello", "not a prompt object"),
    "single quotes": _raw("{'prompt': 'w4'}", "not a prompt object"),
    "comment": _raw("# w4", "not a prompt object"),
    "two objects": _raw(ONE + ONE, "not a prompt object"),
    "trailing comma": _raw('{"prompt": "w4",}', "not a prompt object"),
    "NaN": _raw('{"prompt": NaN}', "not a prompt object"),
    "array": _raw('["w4"]', "not a prompt object: Expected `object`, got `array`"),
    "number": _raw("3", "not a prompt object: Expected `object`, got `int`"),
    "text": _raw('"w4"', "not a prompt object: Expected `object`, got `str`"),
    "null": _raw("null", "not a prompt object: Expected `object`, got `null`"),
    "no prompt": _raw('{"answer": "w4"}', "there is no `prompt`; the columns are answer; set prompts.columns"),
    "another name": _raw(
        '{"question": "w4"}', "there is no `prompt`; the columns are question; set prompts.columns.prompt"
    ),
    "named column absent": _raw(
        '{"prompt": "w4"}', "there is no `question`, which prompts.columns.prompt", "prompts.columns.prompt=question"
    ),
    "prompt null": _raw('{"prompt": null}', "`prompt` is null"),
    "prompt a number": _raw('{"prompt": 3}', "not a prompt object: Expected `str | array`, got `int`"),
    "prompt an object": _raw('{"prompt": {"role": "user"}}', "not a prompt object: Expected `str | array`"),
    "prompt empty": _raw('{"prompt": ""}', "`prompt` is empty"),
    "prompt white space": _raw('{"prompt": " \\n\\t "}', "`prompt` is empty"),
    "invalid UTF-8": _raw(b'{"prompt": "w4 \xff"}', "not a prompt object"),
    "encoded surrogate": _raw(b'{"prompt": "w4 \xed\xa0\x80"}', "not a prompt object"),
    "lone surrogate": _raw('{"prompt": "w4 \\ud800"}', "not a prompt object"),
    "surrogates in the wrong order": _raw('{"prompt": "w4 \\udc00\\ud800"}', "not a prompt object"),
    "NUL": _raw(b'{"prompt": "w4 \x00"}', "not a prompt object"),
    "answer a list": _raw('{"prompt": "w4", "answer": [4]}', "answer is [4]; expected a text or a number"),
    "answer true": _raw('{"prompt": "w4", "answer": true}', "answer is True; expected a text or a number"),
    "answer without its mark": _raw(
        '{"prompt": "w4", "answer": "4"}', "answer '4' does not contain '####'", "prompts.answer_after=####"
    ),
    "domain a number": _raw('{"prompt": "w4", "domain": 1}', "not a prompt object: Expected `str | null`"),
    "tools a text": _raw('{"prompt": "w4", "tools": "x"}', "not a prompt object: Expected `array | null`, got `str`"),
    "tools for a raw prompt": _raw('{"prompt": "w4", "tools": [{}]}', "the row has tools or chat_template_kwargs"),
    "teacher a number": _raw('{"prompt": "w4", "teacher": 1}', "not a prompt object: Expected `str | null`"),
    "teacher unknown": _raw('{"prompt": "w4", "teacher": "x"}', "teacher is 'x'; expected one of ['main']"),
    "teacher with a line break": _raw('{"prompt": "w4", "teacher": "a\\nb"}', "teacher is 'a\\nb'"),
    "no teacher of two": PromptCase(ONE.encode(), "teacher is None; expected one of", (*RAW, "teachers.b.model=b")),
    "nested deeply": _raw('{"prompt": [{"role": ' + "[" * 100_000 + "]" * 100_000 + "}]}", "not a prompt object"),
    "longer than the context": _raw(
        '{"prompt": "' + "w4 " * 600 + '"}', "the prompt has 600 tokens, but a context of 512"
    ),
    "special tokens beyond the context": _raw('{"prompt": "' + "<eos>" * 504 + '"}', "the prompt has 504 tokens"),
    "one gigantic line": _raw('{"prompt": "' + "w" * (1 << 24) + '"}', "the line has 167772"),
    "conversation for a raw prompt": _raw(
        '{"prompt": [{"role": "user", "content": "w4"}]}', "`prompt` is a conversation"
    ),
    "regular expression open": _raw(
        '{"prompt": "w4", "answer": "("}', "answer '(' is not", "environment.verifier=regex"
    ),
    "regular expression of a great count": _raw(
        '{"prompt": "w4", "answer": "a{99999999999}"}', "answer 'a{99999999999}' is not", "environment.verifier=regex"
    ),
    "regular expression nested": _raw(
        '{"prompt": "w4", "answer": "' + "(" * 5_000 + ")" * 5_000 + '"}', "answer '((((", "environment.verifier=regex"
    ),
    "no mathematics": _raw('{"prompt": "w4", "answer": "hello"}', "answer 'hello' holds", "environment.verifier=math"),
    "no mathematics, two lines": _raw(
        '{"prompt": "w4", "answer": "a\\nb"}', "answer 'a\\nb' holds", "environment.verifier=math"
    ),
    "no chat template": PromptCase(ONE.encode(), "prompts.jsonl: the student's tokenizer has no chat template", ()),
    "no messages": _chat('{"prompt": []}', "`prompt` is empty"),
    "message a text": _chat('{"prompt": ["w4"]}', "not a prompt object: Expected `object`, got `str`"),
    "message null": _chat('{"prompt": [null]}', "not a prompt object: Expected `object`, got `null`"),
    "message in a list": _chat('{"prompt": [[]]}', "not a prompt object: Expected `object`, got `array`"),
    "message empty": _chat(_messages("{}"), "message 1 has role None"),
    "no role": _chat(_messages('{"content": "w4"}'), "message 1 has role None"),
    "role a number": _chat(_messages('{"role": 3, "content": "w4"}'), "message 1 has role 3"),
    "role empty": _chat(_messages('{"role": "", "content": "w4"}'), "message 1 has role ''"),
    "no content": _chat(_messages('{"role": "user"}'), "message 1 has content None"),
    "content null": _chat(_messages('{"role": "user", "content": null}'), "message 1 has content None"),
    "content a number": _chat(_messages('{"role": "user", "content": 3}'), "message 1 has content 3"),
    "content empty": _chat(_messages('{"role": "user", "content": ""}'), "message 1 has content ''"),
    "an image": _chat(
        _messages('{"role": "user", "content": [{"type": "text", "text": "w4"}, {"type": "image"}]}'),
        "message 1 has a part of type 'image'",
    ),
    "part without text": _chat(_messages('{"role": "user", "content": [{"type": "text"}]}'), "message 1 has a part"),
    "part a number": _chat(_messages('{"role": "user", "content": [3]}'), "message 1 has a part"),
    "ends with the answer": _chat(
        _messages('{"role": "user", "content": "w4"}', '{"role": "assistant", "content": "w5"}'),
        "the conversation ends with the assistant's message",
    ),
    "second message wrong": _chat(
        _messages('{"role": "user", "content": "w4"}', '{"role": "user"}'), "message 2 has content None"
    ),
    "template refuses": _chat(ONE, "the chat template of the student", "{{ raise_exception('only\\nsystem') }}"),
    "template does not parse": _chat(ONE, "the chat template of the student", "{% for %}"),
    "template names what is not there": _chat(ONE, "the chat template of the student", "{{ a.b.c }}"),
    "template adds texts and numbers": _chat(ONE, "the chat template of the student", "{{ messages + 3 }}"),
    "template divides by zero": _chat(ONE, "the chat template of the student", "{{ 1 / 0 }}"),
    "template without end": _chat(ONE, "the chat template", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "template writes nothing": _chat(ONE, "the prompt has no tokens", "{# nothing #}"),
}
