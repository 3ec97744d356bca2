// Command tpd-ingress makes HAProxy an Ingress controller: it reads Ingresses, Services and EndpointSlices, and has HAProxy
// dial the endpoints themselves over connections that it keeps, as the controllers do that people run. Endpoints come and go
// by HAProxy's runtime API; only another set of backends, or more endpoints than there is room for, reloads it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os/signal"
	"syscall"

	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

func main() {
	class := flag.String("class", "haproxy", "name of the IngressClass")
	port := flag.Int("port", 8080, "port that HAProxy listens on")
	directory := flag.String("directory", "/run/haproxy", "where configuration and socket are kept")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, *class, *port, *directory); err != nil && !errors.Is(err, context.Canceled) {
		log.Fatal(err)
	}
}

func run(ctx context.Context, class string, port int, directory string) error {
	cluster, changes, err := watch(ctx)
	if err != nil {
		return err
	}
	proxy := newProxy(directory, port)
	state := make(slots)
	for {
		routes := cluster.routes(class)
		grown := state.assign(cluster.endpoints(routes))
		if err := proxy.follow(routes, state, grown); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return proxy.end()
		case err := <-proxy.ended:
			return fmt.Errorf("haproxy ended: %w", err)
		case <-changes:
		}
	}
}

// watch fills the caches, and tells of every change after that; of many at once, once.
func watch(ctx context.Context) (*cluster, <-chan struct{}, error) {
	config, err := rest.InClusterConfig()
	if err != nil {
		return nil, nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, nil, err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	watched := &cluster{
		ingresses: factory.Networking().V1().Ingresses().Lister(),
		services:  factory.Core().V1().Services().Lister(),
		slices:    factory.Discovery().V1().EndpointSlices().Lister(),
	}
	changes := make(chan struct{}, 1)
	tell := func() {
		select {
		case changes <- struct{}{}:
		default:
		}
	}
	handler := cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { tell() }, UpdateFunc: func(any, any) { tell() }, DeleteFunc: func(any) { tell() },
	}
	for _, informer := range []cache.SharedIndexInformer{
		factory.Networking().V1().Ingresses().Informer(),
		factory.Core().V1().Services().Informer(),
		factory.Discovery().V1().EndpointSlices().Informer(),
	} {
		if _, err := informer.AddEventHandler(handler); err != nil {
			return nil, nil, err
		}
	}
	factory.Start(ctx.Done())
	for kind, synced := range factory.WaitForCacheSync(ctx.Done()) {
		if !synced {
			return nil, nil, fmt.Errorf("%v cannot be listed", kind)
		}
	}
	return watched, changes, nil
}
