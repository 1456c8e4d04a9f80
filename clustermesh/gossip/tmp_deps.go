package gossip

import (
	_ "github.com/fxamacker/cbor/v2"
	_ "github.com/hashicorp/serf/coordinate"
)
