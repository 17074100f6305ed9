"""Train a sequence-to-sequence model as seq2seq.yaml says: python examples/seq2seq.py."""

import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, set_seed

from trainer import Seq2SeqTrainer, Seq2SeqTrainingArguments

YEARS, DAYS = range(2000, 2030), range(1, 29)
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
NUM_HELD_OUT = 200


def dates():
    """Return every date as (`y2026 m12 d1`, `1 December 2026`), shuffled."""
    found = [
        (f"y{year} m{month} d{day}", f"{day} {name} {year}")
        for year in YEARS
        for month, name in enumerate(MONTHS, start=1)
        for day in DAYS
    ]
    random.Random(0).shuffle(found)
    return found


def build_tokenizer(pairs):
    """Build a tokenizer whose tokens are the words of the dates."""
    words = sorted({word for pair in pairs for text in pair for word in text.split()})
    known = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    whole_words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    whole_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole_words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_model(tokenizer):
    """Build a model of one layer a side with random weights."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def main(args):
    """Train; return the measures of the last evaluation, among them the share of dates written exactly."""
    set_seed(args.seed)
    pairs = dates()
    tokenizer = build_tokenizer(pairs)
    model = build_model(tokenizer)
    rows = []
    for pair in pairs:
        source, target = (tokenizer(text + " </s>")["input_ids"] for text in pair)
        rows.append({"input_ids": source, "labels": target})

    def exact_match(found):
        labels = found.label_ids.copy()
        labels[labels < 0] = tokenizer.pad_token_id
        answers = tokenizer.batch_decode(found.predictions, skip_special_tokens=True)
        references = tokenizer.batch_decode(labels, skip_special_tokens=True)
        return {"exact_match": sum(map(str.__eq__, answers, references)) / len(answers)}

    trainer = Seq2SeqTrainer(
        model,
        args,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=rows[NUM_HELD_OUT:],
        eval_dataset=rows[:NUM_HELD_OUT],
        processing_class=tokenizer,
        compute_metrics=exact_match,
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main(Seq2SeqTrainingArguments.from_yaml(Path(__file__).with_name("seq2seq.yaml"))))
