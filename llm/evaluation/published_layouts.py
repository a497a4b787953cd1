"""Multiple choice as its authors publish it, as an object of query, choices and gold."""

from typing import Any


def as_query(record: Any) -> Any:
    """A record of ARC, CommonsenseQA, OpenBookQA (as published, or as on Hugging Face) or HellaSwag as an object of
    query, choices and gold; any other as it is."""
    try:
        if {'ctx', 'endings', 'label'} <= record.keys():
            return {'query': record['ctx'], 'choices': record['endings'], 'gold': int(record['label'])}
        question = record.get('question_stem', record.get('question'))
        nested = isinstance(question, dict)
        choices = question['choices'] if nested else record['choices']
        if isinstance(choices, dict):
            choices = [{'label': a, 'text': b} for a, b in zip(choices['label'], choices['text'], strict=True)]
        labels = [choice['label'] for choice in choices]
        texts = [choice['text'] for choice in choices]
        gold = labels.index(record['answerKey'])
        return {'query': question['stem'] if nested else question, 'choices': texts, 'gold': gold}
    except (AttributeError, KeyError, TypeError, ValueError):
        return record
