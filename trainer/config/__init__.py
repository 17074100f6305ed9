"""The one configuration: small groups, the flat TrainingArguments made of them, and how it is parsed and written."""
