"""Scan one server with sslyze and print what it found as JSON; runs in sslyze's own environment.

A stranger has 5 s for its request, and sslyze's own patience for an answer is as long: here it is shorter.
"""

import json
import sys

from sslyze import (  # type: ignore[import-not-found]
    ScanCommand,
    Scanner,
    ServerNetworkConfiguration,
    ServerNetworkLocation,
    ServerScanRequest,
    ServerScanResultAsJson,
)

address, port, wanted = sys.argv[1], int(sys.argv[2]), {ScanCommand(name) for name in sys.argv[3].split(",")}
network = ServerNetworkConfiguration(tls_server_name_indication=address, network_timeout=2)
place = ServerNetworkLocation(hostname=address, ip_address=address, port=port)
scanner = Scanner(per_server_concurrent_connections_limit=2)
scanner.queue_scans([ServerScanRequest(place, network_configuration=network, scan_commands=wanted)])
for found in scanner.get_results():
    print(json.dumps(json.loads(ServerScanResultAsJson.model_validate(found).model_dump_json())))
