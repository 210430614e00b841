"""Data: text, prompts and chats and how they become the files of tokens that training reads."""
