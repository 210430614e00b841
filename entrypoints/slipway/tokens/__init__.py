"""Data: text, prompts and chats on their way to the files of tokens that training reads."""
