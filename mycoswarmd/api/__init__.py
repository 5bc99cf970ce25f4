"""The aiohttp listeners: who is asking, one route table, the OpenAI dialect, the control interface."""
