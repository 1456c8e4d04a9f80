package main

import (
	"fmt"
	"net"
	"strings"
)

// Each proxy listens at one port of 127.0.0.1 for HTTP/1.1 and at another one for gRPC.
const (
	haproxyHTTP1, haproxyGRPC = "127.0.0.1:18081", "127.0.0.1:18091"
	nginxHTTP1, nginxGRPC     = "127.0.0.1:18082", "127.0.0.1:18092"
	oursHTTP1, oursGRPC       = "127.0.0.1:18083", "127.0.0.1:18093"
	netHTTPHTTP1              = "127.0.0.1:18084"
	otherHTTP1                = "127.0.0.1:18085"
)

const haproxyConf = `global
  # It wants two descriptors for each connection that it may have, which may be above the hard limit here.
  no strict-limits
  nbthread 1
  maxconn 20000
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  http-reuse always
frontend http1
  bind 127.0.0.1:18081
  default_backend http1
backend http1
  balance roundrobin
  server a 127.0.0.11:18080
  server b 127.0.0.12:18080
frontend grpc
  bind 127.0.0.1:18091 proto h2
  default_backend grpc
backend grpc
  balance roundrobin
  server a 127.0.0.11:18090 proto h2
  server b 127.0.0.12:18090 proto h2
`

const nginxConf = `daemon off;
master_process off;
worker_processes 1;
pid DIR/nginx.pid;
error_log DIR/nginx.log;
events { worker_connections 20000; }
http {
  access_log off;
  client_body_temp_path DIR/body;
  proxy_temp_path DIR/temp;
  keepalive_requests 1000000000;
  upstream http1 { server 127.0.0.11:18080; server 127.0.0.12:18080; keepalive 128; keepalive_requests 1000000000; }
  upstream grpc { server 127.0.0.11:18090; server 127.0.0.12:18090; keepalive 128; keepalive_requests 1000000000; }
  server {
    listen 127.0.0.1:18082;
    location / { proxy_pass http://http1; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
  server {
    listen 127.0.0.1:18092 http2;
    location / { grpc_pass grpc://grpc; }
  }
}
`

// oursConf are the services that "clustermesh proxy --standalone" reads: lines of JSON, as an agent tells them.
func oursConf() string {
	var out strings.Builder
	out.WriteString(`[{"reset":true},{"self":{"cluster":"east","node":"node1"}}`)
	service := func(name, address, app string, backends []string) {
		number := port(address)
		key := fmt.Sprintf(`{"service":{"namespace":"bench","name":%q},"port":"main","protocol":"TCP","family":4}`, name)
		fmt.Fprintf(&out, `,{"frontend":{"address":"127.0.0.1","port":%s,"protocol":"TCP","target":%s,"cluster":"east","clusterID":1,"affinity":"none","l7":true}}`, number, key)
		fmt.Fprintf(&out, `,{"route":{"port":%s,"number":%s,"options":{"appProtocol":%q,"algorithm":"round_robin","affinity":"none","retries":2,"retryBudget":20,`+
			`"maxConnections":1024,"maxPending":1024,"outlierFailures":5,"ejectFor":10000000000,"maxEjected":50}}}`, key, number, app)
		for _, b := range backends {
			host, _, _ := net.SplitHostPort(b)
			fmt.Fprintf(&out, `,{"target":{"port":%s,"address":%q,"number":%s,"cluster":"east","clusterID":1,"node":"node1","local":true}}`, key, host, port(b))
		}
	}
	service("http1", oursHTTP1, "http", http1Backends)
	service("grpc", oursGRPC, "h2c", grpcBackends)
	out.WriteString(`,{"synced":true}]` + "\n")
	return out.String()
}

func port(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}
