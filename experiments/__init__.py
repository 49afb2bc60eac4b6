"""The evidence: runs, tables, pictures and measurements; nothing else imports these files."""
