// Package xds serves the L7 configuration to Envoy and to proxyless gRPC by Envoy's discovery protocol.
package xds
