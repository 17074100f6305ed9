"""What users type. The only room that prints."""
