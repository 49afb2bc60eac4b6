"""The evidence: runs, tables, pictures and measurements. Other files import only `tiny`, when it is asked for."""
