"""The tables of the pages, one file a topic: functions from the content of result files to markdown."""
