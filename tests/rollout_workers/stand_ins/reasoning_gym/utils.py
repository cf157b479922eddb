import re


def extract_answer(completion: str, tag_name: str = "answer", strip: bool = True) -> str | None:
    found = re.findall(rf"<{tag_name}>\s?(.*?)\s?</{tag_name}>", completion, flags=re.DOTALL)
    return found[-1].strip() if found else None
